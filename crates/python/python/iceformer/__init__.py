"""Exact and sparse attention on the CPU.

`attention` and `KeyValueCache` work on NumPy arrays and torch tensors; importing `iceformer.transformers` makes
`attn_implementation="iceformer"` known to Hugging Face transformers; `Engine` runs whole models without torch.
"""

from iceformer._attention import KeyValueCache, attention
from iceformer._core import HeadReport, Report, available_threads, kernel
from iceformer._core import version as _version
from iceformer.engine import Answer, Engine, Stream

__version__: str = _version()
__all__ = [
    "Answer",
    "Engine",
    "HeadReport",
    "KeyValueCache",
    "Report",
    "Stream",
    "__version__",
    "attention",
    "available_threads",
    "kernel",
]
