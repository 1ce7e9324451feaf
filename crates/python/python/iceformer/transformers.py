"""IceFormer as an attention implementation of Hugging Face transformers.

```python
import iceformer.transformers
model = AutoModel.from_pretrained(NAME, attn_implementation="iceformer")
```

Importing this module registers the implementation. It computes decoders and encoders, causal, bidirectional and with
sliding windows, padded on either side, with grouped queries, soft-capped logits and sinks, prompts in chunks, and
`generate()` with its caches. Masks are never written out as `[tokens, keys]` tensors.

Handed over to torch's SDPA, with one warning for each reason: inputs that need gradients, dropout, additive position
biases (T5), masks that are no causal, windowed or padding mask (4-D masks of the user's own, packed sequences, image
tokens, keys that a model selects as DeepSeek V3.2 does), tensors that are not on the CPU, not of float32, float16 or
bfloat16 or (outside of `torch.autocast`) not of one type, `torch.jit.trace`, `torch.vmap` and tensor subclasses. Models
whose logits are soft-capped or have sinks, which SDPA does not know, are then computed by their definition. While a
graph is compiled or exported no warning is given; with gradients enabled, as they are unless switched off, a model
whose parameters require them gets SDPA in its graph: `torch.no_grad()` around `torch.export.export` and around calls of
compiled models gets the operator. Attention weights asked for (`output_attentions=True`) are an error, and so is a
family that computes its attention itself (Bloom, MPT, MPNet, DeBERTa, Longformer) or edits its masks (DeepSeek V4,
MiniMax M3).
"""

from __future__ import annotations

import contextlib
import numbers
import os
import warnings
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass, replace
from typing import Any

try:
    import torch
    from torch.autograd import forward_ad
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
except ImportError as error:
    raise ImportError(
        'iceformer.transformers needs torch and transformers >= 5.10: pip install "iceformer[transformers]"'
    ) from error

from iceformer import _core, _operator
from iceformer._attention import WITHOUT_BUDGET, method_and_budget, options
from iceformer._families import NAME, refuse_other_families, takes_implementation
from iceformer._masks import MaskPattern, ToldMask, mask, only_selected, pattern_of, pattern_of_key_mask


@dataclass(frozen=True)
class Settings:
    """How attention is computed; see `iceformer.attention`. The environment variables ICEFORMER_METHOD,
    ICEFORMER_BUDGET, ICEFORMER_KV_TYPE and ICEFORMER_THREADS set what a process starts with."""

    method: str = "auto"
    budget: float | None = None
    kv_type: str = "auto"
    #: None: `torch.get_num_threads()`.
    threads: int | None = None

    @classmethod
    def from_environment(cls) -> Settings:
        """The settings that the environment asks for."""

        def number(name: str, kind: Callable[[str], Any]) -> Any:
            text = os.environ.get(name)
            if not text:
                return None
            try:
                return kind(text)
            except ValueError:
                raise ValueError(f"the environment variable {name} is {text!r}; expected a number") from None

        found = cls(
            method=os.environ.get("ICEFORMER_METHOD") or "auto",
            budget=number("ICEFORMER_BUDGET", float),
            kv_type=os.environ.get("ICEFORMER_KV_TYPE") or "auto",
            threads=number("ICEFORMER_THREADS", int),
        )
        found.check()
        return found

    def check(self) -> None:
        """Raises ValueError for a setting out of its range, TypeError for one of another type."""
        if self.method not in ("auto", "exact", "budgeted", "dci"):
            raise ValueError(f'method is {self.method!r}; expected "auto", "exact", "budgeted" or "dci"')
        if self.kv_type not in ("auto", "f32", "bf16", "int8"):
            raise ValueError(f'kv_type is {self.kv_type!r}; expected "auto", "f32", "bf16" or "int8"')
        if self.budget is not None and not isinstance(self.budget, numbers.Real):
            raise TypeError(f"budget is {self.budget!r}; expected a number above 0 and up to 1")
        if self.budget is not None and not 0 < self.budget <= 1:
            raise ValueError(f"budget is {self.budget}; expected a share above 0 and up to 1")
        method_and_budget(self.method, self.budget)
        if self.threads is not None and not isinstance(self.threads, numbers.Integral):
            raise TypeError(f"threads is {self.threads!r}; expected a whole number from 1 to 1024")
        if self.threads is not None and not 1 <= self.threads <= 1024:
            raise ValueError(f"threads is {self.threads}; expected 1 to 1024")


_default = Settings.from_environment()
_settings: ContextVar[Settings | None] = ContextVar("iceformer_settings", default=None)
_reports = _operator.reports
_collectors: ContextVar[list[tuple[int | None, _core.Report]] | None] = ContextVar("iceformer_reports", default=None)
_warned: set[str] = set()


def current_settings() -> Settings:
    """The settings in force."""
    return _settings.get() or _default


def _changed(before: Settings, changes: dict[str, Any]) -> Settings:
    """The settings `before` with `changes`, checked. A method without a budget leaves that of `before` behind."""
    if changes.get("method") in WITHOUT_BUDGET:
        changes = {"budget": None, **changes}
    changed = replace(before, **changes)
    changed.check()
    return changed


@contextlib.contextmanager
def settings(**changes: Any) -> Iterator[Settings]:
    """Changes settings inside a block: `with iceformer.transformers.settings(method="budgeted", budget=0.02):`

    A thread started inside (to stream what `generate()` gives) has those of the process still: call `configure`, or run
    it with `contextvars.copy_context().run`."""
    changed = _changed(current_settings(), changes)
    token = _settings.set(changed)
    try:
        yield changed
    finally:
        _settings.reset(token)


def configure(**changes: Any) -> Settings:
    """Changes the settings of the whole process."""
    global _default
    changed = _changed(_default, changes)
    _default = changed
    return changed


def last_report() -> _core.Report | None:
    """What the last attention call of this thread did; None before the first one, and after one that SDPA computed or
    that ran inside a compiled graph."""
    return getattr(_reports, "last", None)


@contextlib.contextmanager
def collect_reports() -> Iterator[list[tuple[int | None, _core.Report]]]:
    """Collects `(layer index, report)` of every attention call inside a `with` block, of the thread that it is in (see
    `settings`)."""
    reports: list[tuple[int | None, _core.Report]] = []
    token = _collectors.set(reports)
    try:
        yield reports
    finally:
        _collectors.reset(token)


def attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: MaskPattern | torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    position_bias: torch.Tensor | None = None,
    indices: torch.Tensor | None = None,
    **more: Any,
) -> tuple[torch.Tensor, None]:
    """The attention function registered with transformers: gives `[batch, tokens, heads, value_dim]` and no weights.

    Raises:
        ValueError: When attention weights are asked for, the mask is for another number of queries or keys, or the
            model hands over what changes attention in a way that is not known here.
    """
    if more.get("output_attentions"):
        raise ValueError(
            'attn_implementation="iceformer" never has attention weights to return; load the model with '
            'attn_implementation="eager" for output_attentions=True'
        )
    _look_for_unknown(module, more)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    causal = bool(getattr(module, "is_causal", True) if is_causal is None else is_causal)
    if indices is not None:
        attention_mask = only_selected(indices, attention_mask, query, key, causal)
    pattern = pattern_of(attention_mask)
    if isinstance(pattern, MaskPattern) and pattern.gives_way(query.shape[2], key.shape[2], type(module).__name__):
        attention_mask = pattern = None
    if pattern is None:
        # As SDPA's hook: causal from the first key on, unless there is one query only.
        pattern = MaskPattern(causal and query.shape[2] > 1, None, 0, None, None, None, None)
    elif isinstance(pattern, torch.Tensor) and not torch.compiler.is_compiling():
        pattern = pattern_of_key_mask(pattern, key.shape[2])
    query, key, value = _as_autocast_would(query, key, value)

    reason = _reason_to_hand_over(query, key, value, pattern, dropout, s_aux, position_bias, more)
    if reason is not None:
        _warn_once(f"iceformer hands attention over to SDPA: {reason}")
        _reports.last = None
        return _hand_over(
            module, query, key, value, attention_mask, dropout, scale, is_causal, softcap, s_aux, position_bias, more
        )
    assert isinstance(pattern, MaskPattern)
    chosen = current_settings()
    kv_type = "auto" if softcap is not None and chosen.kv_type == "int8" else chosen.kv_type
    if torch.compiler.is_compiling():
        output = _operator.attention(
            query,
            key,
            value,
            pattern.padding,
            pattern.offset,
            s_aux,
            pattern.first_position,
            pattern.causal,
            pattern.window or 0,
            float(scale),
            softcap or 0.0,
            chosen.method,
            chosen.budget or 0.0,
            kv_type,
            chosen.threads or 0,
        )
        return output, None
    output, report = _operator.run(
        query,
        key,
        value,
        options(
            method=chosen.method,
            budget=chosen.budget,
            causal=pattern.causal,
            window=pattern.window,
            scale=scale,
            first_position=pattern.first_position,
            key_ranges=pattern.ranges,
            soft_cap=softcap,
            sinks=None if s_aux is None else s_aux.detach().float().tolist(),
            kv_type=kv_type,
            threads=chosen.threads or torch.get_num_threads(),
        ),
    )
    _reports.last = report
    collector = _collectors.get()
    if collector is not None:
        collector.append((getattr(module, "layer_idx", None), report))
    return output, None


#: Arguments beside those of `attention` that change nothing here: what they say is in the mask already, is for flash
#: attention's kernels, or is no matter of attention.
_OF_NO_CONCERN = {
    "cache",
    "cu_seq_lens_k",
    "cu_seq_lens_q",
    "deterministic",
    "input_ids",
    "logits_to_keep",
    "max_length_k",
    "max_length_q",
    "num_items_in_batch",
    "output_attentions",
    "output_hidden_states",
    "output_router_logits",
    "position_ids",
    "return_dict",
    "seq_idx",
    "sliding_window",
    "use_cache",
}
#: Blocks of keys that a layer selects, and sinks of each token.
_CHANGE_ATTENTION = {"block_indices", "sinks"}


def _look_for_unknown(module: torch.nn.Module, more: dict[str, Any]) -> None:
    """Nothing that a model asks for is left out silently."""
    for name, value in more.items():
        if value is None or name in _OF_NO_CONCERN:
            continue
        if name in _CHANGE_ATTENTION:
            raise ValueError(
                f'{type(module).__name__} hands "{name}" to its attention, which attn_implementation="{NAME}" does not '
                'know; load the model with attn_implementation="sdpa" or "eager"'
            )
        _warn_once(
            f'attention goes without the argument "{name}", which iceformer does not know; where it changes attention, '
            'load the model with attn_implementation="sdpa" or "eager"'
        )


def _as_autocast_would(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The tensors in autocast's type where they differ, as SDPA takes them there: rotary embeddings and norms leave
    queries and keys in float32, while values come as their projection makes them."""
    if query.dtype == key.dtype == value.dtype or not torch.is_autocast_enabled("cpu"):
        return query, key, value
    if any(tensor.device.type != "cpu" or tensor.dtype == torch.float64 for tensor in (query, key, value)):
        return query, key, value
    narrow = torch.get_autocast_dtype("cpu")
    return query.to(narrow), key.to(narrow), value.to(narrow)


def _reason_to_hand_over(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    pattern: MaskPattern | torch.Tensor,
    dropout: float,
    s_aux: torch.Tensor | None,
    position_bias: torch.Tensor | None,
    more: dict[str, Any],
) -> str | None:
    inputs = (query, key, value) if s_aux is None else (query, key, value, s_aux)
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in inputs):
        return "the inputs need gradients (use torch.inference_mode() or torch.no_grad() for inference)"
    if not torch.compiler.is_compiling():
        if torch.jit.is_tracing():
            return "torch.jit.trace records the call (use torch.compile or torch.export)"
        # Unpacking takes a microsecond for each: only where there is a level of forward-mode gradients at all.
        if getattr(forward_ad, "_current_level", 0) >= 0 and any(
            forward_ad.unpack_dual(tensor).tangent is not None for tensor in inputs
        ):
            return "the inputs carry tangents (forward-mode gradients)"
        if any(type(tensor) not in _PLAIN or _is_wrapped(tensor) for tensor in inputs):
            return "the tensors are wrapped (a tensor subclass, FakeTensorMode or torch.func)"
    if dropout:
        return "dropout is on (call model.eval() for inference)"
    if position_bias is not None:
        return "the model adds position biases to its logits"
    if isinstance(pattern, torch.Tensor):
        return "the mask is no causal, windowed or padding mask"
    if more.get("cache") is not None:
        return "the cache is paged"
    if query.device.type != "cpu":
        return f"the tensors are on {query.device.type}"
    if query.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return f"the tensors are of {query.dtype}"
    if not query.dtype == key.dtype == value.dtype:
        return "queries, keys and values are of different types"
    if pattern.ranges is not None and len(pattern.ranges) != query.shape[0]:
        return "the mask is for another batch size than the queries"
    if key.shape[0] != query.shape[0]:
        return "queries and keys have different batch sizes"
    return None


_PLAIN = (torch.Tensor, torch.nn.Parameter)
_is_wrapped: Callable[[torch.Tensor], bool] = torch._C._functorch.is_functorch_wrapped_tensor


def _warn_once(message: str) -> None:
    if torch.compiler.is_compiling() or message in _warned:
        return
    _warned.add(message)
    warnings.warn(message, stacklevel=3)


def _hand_over(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: MaskPattern | torch.Tensor | None,
    dropout: float,
    scale: float,
    is_causal: bool | None,
    softcap: float | None,
    s_aux: torch.Tensor | None,
    position_bias: torch.Tensor | None,
    more: dict[str, Any],
) -> tuple[torch.Tensor, None]:
    if isinstance(attention_mask, ToldMask):
        attention_mask = attention_mask.pattern
    written = attention_mask.tensor() if isinstance(attention_mask, MaskPattern) else attention_mask
    if softcap is None and s_aux is None:
        return sdpa_attention_forward(
            module,
            query,
            key,
            value,
            written,
            dropout=dropout,
            scaling=scale,
            is_causal=is_causal,
            position_bias=position_bias,
            **more,
        )
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    if written is None and causal and query.shape[2] > 1:
        written = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool, device=query.device).tril()
    if position_bias is not None:
        if written is not None and written.dtype == torch.bool:
            position_bias = position_bias.masked_fill(~written, torch.finfo(position_bias.dtype).min)
        elif written is not None:
            position_bias = position_bias + written
        written = position_bias
    return _operator.eager(query, key, value, written, scale, softcap, s_aux, dropout), None


def register() -> None:
    """Registers the implementation with transformers; done when this module is imported."""
    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, mask)
    refuse_other_families()


register()

__all__ = [
    "NAME",
    "MaskPattern",
    "Settings",
    "ToldMask",
    "attention",
    "collect_reports",
    "configure",
    "current_settings",
    "last_report",
    "mask",
    "register",
    "settings",
    "takes_implementation",
]
