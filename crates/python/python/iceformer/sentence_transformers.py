"""IceFormer in sentence-transformers.

Any model whose transformer takes an attention implementation works with

```python
import iceformer.transformers
SentenceTransformer(NAME, model_kwargs={"attn_implementation": "iceformer"})
```

which is all that `load` does, beside a check that the model did take it, and that a process which unpickles the model
(of `start_multi_process_pool`, for one) gets this import along. Families without transformers' attention interface
(MPNet, DeBERTa, Longformer) are refused. The torch backend only; ONNX and OpenVINO models bring their attention along.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from iceformer import transformers as _hook

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer


class _Import:
    """An attribute of a model: whoever unpickles it imports this module, which registers the implementation."""


def load(name: str | os.PathLike[str], **settings: Any) -> SentenceTransformer:
    """A `SentenceTransformer` whose attention IceFormer computes.

    Args:
        name: Name or folder of the model.
        **settings: Settings of `SentenceTransformer`.

    Raises:
        ValueError: When the model's family takes no attention implementation, or another implementation or backend is
            asked for.
    """
    from sentence_transformers import SentenceTransformer

    if settings.get("backend", "torch") != "torch":
        raise ValueError(f'backend is {settings["backend"]!r}; expected "torch": the others bring their own attention')
    arguments = dict(settings.pop("model_kwargs", None) or {})
    asked_for = arguments.setdefault("attn_implementation", _hook.NAME)
    if asked_for != _hook.NAME:
        raise ValueError(
            f'model_kwargs asks for attn_implementation={asked_for!r}; expected "{_hook.NAME}" or none: '
            "SentenceTransformer itself loads models with another"
        )
    model = check(SentenceTransformer(os.fspath(name), model_kwargs=arguments, **settings))
    model.iceformer_import = _Import()  # type: ignore[assignment]
    return model


def check(model: SentenceTransformer) -> SentenceTransformer:
    """`model`, when its transformer does hand its attention over.

    Raises:
        ValueError: When it does not.
    """
    transformer = getattr(model[0], "auto_model", None) or getattr(model[0], "model", None)
    if transformer is None:
        raise ValueError(
            f"the model begins with a {type(model[0]).__name__}, which has no transformer and so no attention; "
            "SentenceTransformer itself loads it"
        )
    family = type(transformer).__name__
    chosen = getattr(getattr(transformer, "config", None), "_attn_implementation", None)
    if chosen != _hook.NAME or not _hook.takes_implementation(transformer):
        raise ValueError(
            f"{family} does not take an attention implementation (it has {chosen!r}); expected a family with "
            "transformers' attention interface, as BERT, RoBERTa, XLM-R, ModernBERT or a decoder"
        )
    return model


__all__ = ["check", "load"]
