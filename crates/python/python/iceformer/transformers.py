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
tokens), tensors that are not on the CPU or not of float32, float16 or bfloat16, `torch.jit.trace`, `torch.vmap` and
tensor subclasses. Models whose logits are soft-capped or have sinks, which SDPA does not know, are then computed by
their definition. Attention weights asked for (`output_attentions=True`) are an error, and so is a family that computes
its attention itself (Bloom, MPT, MPNet, DeBERTa, Longformer).
"""

from __future__ import annotations

import contextlib
import functools
import os
import threading
import types
import warnings
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass, replace
from typing import Any

try:
    import torch
    from torch.autograd import forward_ad
    from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel, masking_utils
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
except ImportError as error:
    raise ImportError(
        'iceformer.transformers needs torch and transformers >= 5.10: pip install "iceformer[transformers]"'
    ) from error

from iceformer import _core, _operator
from iceformer._attention import options

#: The name that `attn_implementation` takes.
NAME = "iceformer"


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
        """Raises ValueError for a setting out of its range."""
        if self.method not in ("auto", "exact", "budgeted", "dci"):
            raise ValueError(f'method is {self.method!r}; expected "auto", "exact", "budgeted" or "dci"')
        if self.kv_type not in ("auto", "f32", "bf16", "int8"):
            raise ValueError(f'kv_type is {self.kv_type!r}; expected "auto", "f32", "bf16" or "int8"')
        if self.budget is not None and not 0 < self.budget <= 1:
            raise ValueError(f"budget is {self.budget}; expected a share above 0 and up to 1")
        if self.threads is not None and not 1 <= self.threads <= 1024:
            raise ValueError(f"threads is {self.threads}; expected 1 to 1024")


_default = Settings.from_environment()
_settings: ContextVar[Settings | None] = ContextVar("iceformer_settings", default=None)
_reports = threading.local()
_collectors: ContextVar[list[tuple[int | None, _core.Report]] | None] = ContextVar("iceformer_reports", default=None)
_warned: set[str] = set()


def current_settings() -> Settings:
    """The settings in force."""
    return _settings.get() or _default


@contextlib.contextmanager
def settings(**changes: Any) -> Iterator[Settings]:
    """Changes settings inside a block: `with iceformer.transformers.settings(method="budgeted", budget=0.02):`"""
    changed = replace(current_settings(), **changes)
    changed.check()
    token = _settings.set(changed)
    try:
        yield changed
    finally:
        _settings.reset(token)


def configure(**changes: Any) -> Settings:
    """Changes the settings of the whole process."""
    global _default
    changed = replace(_default, **changes)
    changed.check()
    _default = changed
    return changed


def last_report() -> _core.Report | None:
    """What the last attention call of this thread did; None before the first one, and after one that SDPA computed or
    that ran inside a compiled graph."""
    return getattr(_reports, "last", None)


@contextlib.contextmanager
def collect_reports() -> Iterator[list[tuple[int | None, _core.Report]]]:
    """Collects `(layer index, report)` of every attention call inside a `with` block."""
    reports: list[tuple[int | None, _core.Report]] = []
    token = _collectors.set(reports)
    try:
        yield reports
    finally:
        _collectors.reset(token)


class MaskPattern:
    """A mask that is told rather than written out.

    The first query stands at key `first_position` (plus `offset`, a tensor, inside compiled graphs). `padding` is
    `[batch, keys]`, True where a key is none.
    """

    def __init__(
        self,
        causal: bool,
        window: int | None,
        first_position: int,
        offset: torch.Tensor | None,
        padding: torch.Tensor | None,
        ranges: list[tuple[int, int]] | None,
        build: Callable[[], torch.Tensor] | None,
    ) -> None:
        self.causal = causal
        self.window = window
        self.first_position = first_position
        self.offset = offset
        self.padding = padding
        self.ranges = ranges
        self._build = build
        self._tensor: torch.Tensor | None = None

    def tensor(self) -> torch.Tensor:
        """The mask written out, `[batch, 1, tokens, keys]`, for who needs it so."""
        if self._tensor is None:
            assert self._build is not None
            self._tensor = self._build()
        return self._tensor


class ToldMask(torch.Tensor):
    """A `MaskPattern` in the shape of the 4-D boolean mask that it stands for.

    `generate()` and some models look at a mask, slice it or make it contiguous. Metadata costs nothing; whatever
    touches the numbers gets the mask written out, a plain tensor.
    """

    pattern: MaskPattern

    @staticmethod
    def of(pattern: MaskPattern, shape: tuple[int, ...], device: torch.device | str) -> ToldMask:
        """The mask of `pattern`, of `shape` `[batch, 1, tokens, keys]`; no memory is taken for it."""
        told = torch.ones((), dtype=torch.bool, device=device).expand(shape).as_subclass(ToldMask)
        told.pattern = pattern
        return told

    def contiguous(self, *_: Any, **__: Any) -> ToldMask:  # type: ignore[override]
        """Itself: what it stands for has no layout."""
        return self

    @classmethod
    def __torch_function__(cls, func: Any, _types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _METADATA:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **(kwargs or {}))
        numbers = next(
            (part for part in args if isinstance(part, torch.Tensor) and part.is_floating_point()), None
        ) if func in _ADDITIONS else None

        def written(told: ToldMask) -> torch.Tensor:
            tensor = told.pattern.tensor()
            if numbers is None:
                return tensor
            # A model that computes its attention itself adds masks to its logits.
            nothing = torch.zeros((), dtype=numbers.dtype, device=tensor.device)
            return torch.where(tensor, nothing, torch.finfo(numbers.dtype).min)

        args, kwargs = torch.utils._pytree.tree_map_only(ToldMask, written, (args, kwargs or {}))
        return func(*args, **kwargs)


_METADATA = {
    *(getattr(torch.Tensor, name).__get__ for name in ("shape", "ndim", "dtype", "device", "layout", "requires_grad")),
    torch.Tensor.dim,
    torch.Tensor.size,
    torch.Tensor.is_contiguous,
}


_ADDITIONS = {
    torch.add,
    *(getattr(torch.Tensor, name) for name in ("add", "add_", "__add__", "__radd__", "__iadd__")),
}


def mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | torch.Tensor = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Any] = masking_utils.causal_mask_function,
    attention_mask: torch.Tensor | None = None,
    local_size: int | None = None,
    allow_is_causal_skip: bool = True,
    allow_is_bidirectional_skip: bool = False,
    use_vmap: bool = False,
    device: torch.device | str = "cpu",
    **more: Any,
) -> MaskPattern | torch.Tensor:
    """The mask function registered with transformers: a `ToldMask` (inside compiled graphs a `MaskPattern`), or SDPA's
    own mask where there is no pattern."""

    def write_out() -> torch.Tensor:
        written = masking_utils.sdpa_mask(
            batch_size=batch_size,
            q_length=q_length,
            kv_length=kv_length,
            q_offset=q_offset,  # type: ignore[arg-type]
            kv_offset=kv_offset,
            mask_function=mask_function,
            attention_mask=attention_mask,
            local_size=local_size,
            allow_is_causal_skip=False,
            allow_is_bidirectional_skip=False,
            use_vmap=use_vmap,
            device=device,
            **more,
        )
        assert written is not None
        return written

    compiling = torch.compiler.is_compiling()
    if not compiling and (torch.jit.is_tracing() or type(torch.empty(0)) is not torch.Tensor):
        # A trace, or tensors that are fake: a mask that is told would not come through.
        return write_out()
    if compiling:
        config = more.get("config")
        pattern = _pattern_of_flags(local_size, allow_is_causal_skip, allow_is_bidirectional_skip, config)
    else:
        pattern = _pattern_of_function(mask_function)
    if pattern is None:
        return write_out()
    causal, window = pattern

    padding = None
    if attention_mask is not None:
        padding = masking_utils.prepare_padding_mask(attention_mask, kv_length, kv_offset)
        assert padding is not None
        padding = padding[:, kv_offset : kv_offset + kv_length]
    if compiling:
        offset, first = (q_offset, -kv_offset) if isinstance(q_offset, torch.Tensor) else (None, q_offset - kv_offset)
        return MaskPattern(causal, window, first, offset, padding, None, write_out)
    first = int(q_offset) - int(kv_offset)
    if first < 0:
        return write_out()
    try:
        ranges = None if padding is None else _operator.padding_ranges(padding.cpu())
    except ValueError:
        return write_out()
    told = MaskPattern(causal, window, first, None, padding, ranges, write_out)
    return ToldMask.of(told, (batch_size, 1, q_length, kv_length), device)


def _pattern_of_function(function: Callable[..., Any]) -> tuple[bool, int | None] | None:
    """Whether a mask function of transformers is causal, and its window; None for what is neither."""
    bounds = _bounds(function)
    if bounds is None:
        return None
    behind, ahead = bounds
    if ahead == 1:
        return True, behind
    # One window for both sides, or none.
    return (False, behind) if behind == ahead else None


def _bounds(function: Callable[..., Any]) -> tuple[int | None, int | None] | None:
    """A query at `p` sees keys above `p − behind` and below `p + ahead`; None for what is no such band."""
    if function is masking_utils.causal_mask_function:
        return None, 1
    if function is masking_utils.bidirectional_mask_function:
        return None, None
    if not isinstance(function, types.FunctionType) or function.__module__ != masking_utils.__name__:
        return None
    cells = {name: cell.cell_contents for name, cell in zip(function.__code__.co_freevars, function.__closure__ or ())}
    maker = function.__qualname__.partition(".")[0]
    if maker == "sliding_window_overlay":
        return cells["sliding_window"], None
    if maker == "sliding_window_bidirectional_overlay":
        return cells["sliding_window"] + 1, cells["sliding_window"] + 1
    if maker == "and_masks":
        parts = [bounds for bounds in map(_bounds, cells["mask_functions"]) if bounds is not None]
        if len(parts) < len(cells["mask_functions"]):
            return None
        behind = [part[0] for part in parts if part[0] is not None]
        ahead = [part[1] for part in parts if part[1] is not None]
        return min(behind, default=None), min(ahead, default=None)
    return None


def _pattern_of_flags(
    local_size: int | None, causal_skip: bool, bidirectional_skip: bool, config: Any
) -> tuple[bool, int | None] | None:
    """The same inside a compiled graph, where functions cannot be looked into: transformers allows a skip only where
    the mask is causal (or full) and nothing else."""
    if local_size is not None and (
        local_size != getattr(config, "sliding_window", None) or getattr(config, "attention_chunk_size", None)
    ):
        return None
    if causal_skip:
        return True, local_size
    if bidirectional_skip:
        return False, None if local_size is None else local_size + 1
    return None


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
    **more: Any,
) -> tuple[torch.Tensor, None]:
    """The attention function registered with transformers: gives `[batch, tokens, heads, value_dim]` and no weights.

    Raises:
        ValueError: When attention weights are asked for.
    """
    if more.get("output_attentions"):
        raise ValueError(
            'attn_implementation="iceformer" never has attention weights to return; load the model with '
            'attn_implementation="eager" for output_attentions=True'
        )
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    pattern = attention_mask = attention_mask.pattern if isinstance(attention_mask, ToldMask) else attention_mask
    if pattern is None:
        # As SDPA's hook: causal from the first key on, unless there is one query only.
        causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
        pattern = MaskPattern(bool(causal) and query.shape[2] > 1, None, 0, None, None, None, None)
    elif isinstance(pattern, torch.Tensor) and not torch.compiler.is_compiling():
        pattern = _pattern_of_key_mask(pattern, key.shape[2])

    reason = _reason_to_hand_over(query, key, value, pattern, dropout, s_aux, position_bias, more)
    if reason is not None:
        _warn_once(reason)
        _reports.last = None
        return _hand_over(
            module, query, key, value, attention_mask, dropout, scale, is_causal, softcap, s_aux, position_bias, more
        )
    assert isinstance(pattern, MaskPattern)
    chosen = current_settings()
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
            chosen.kv_type,
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
            kv_type="auto" if softcap is not None and chosen.kv_type == "int8" else chosen.kv_type,
            threads=chosen.threads or torch.get_num_threads(),
        ),
    )
    _reports.last = report
    collector = _collectors.get()
    if collector is not None:
        collector.append((getattr(module, "layer_idx", None), report))
    return output, None


def _pattern_of_key_mask(mask: torch.Tensor, keys: int) -> MaskPattern | torch.Tensor:
    """The pattern of a 4-D mask that is the same for all heads and queries, where only padding is masked."""
    if mask.ndim != 4 or mask.shape[1] != 1 or mask.shape[2] != 1 or mask.shape[3] != keys or mask.requires_grad:
        return mask
    if mask.dtype == torch.bool:
        padding = mask[:, 0, 0]
    else:
        masked = mask[:, 0, 0] <= torch.finfo(mask.dtype).min
        if not (masked | (mask[:, 0, 0] == 0)).all():
            return mask
        padding = ~masked
    try:
        ranges = _operator.padding_ranges(padding.cpu())
    except ValueError:
        return mask
    return MaskPattern(False, None, 0, None, padding, ranges, None)


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


def _warn_once(reason: str) -> None:
    if torch.compiler.is_compiling() or reason in _warned:
        return
    _warned.add(reason)
    warnings.warn(f"iceformer hands attention over to SDPA: {reason}", stacklevel=3)


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


def takes_implementation(model: type[PreTrainedModel] | PreTrainedModel) -> bool:
    """Whether models of this family let an attention implementation compute their attention. Others go on with code of
    their own, to which our masks mean nothing."""
    return bool(getattr(model, "_supports_attention_backend", False) or getattr(model, "_supports_sdpa", False))


def _refuse_other_families() -> None:
    """transformers refuses SDPA for families that compute their attention themselves, but takes any other name for
    them: here it refuses ours too."""
    before = PreTrainedModel.get_correct_attn_implementation
    if getattr(before, "checks_iceformer", False):
        return

    @functools.wraps(before)
    def checked(self: PreTrainedModel, requested_attention: str | None, *rest: Any, **more: Any) -> str:
        if requested_attention == NAME and not takes_implementation(self):
            raise ValueError(
                f'{type(self).__name__} computes its attention itself and cannot take attn_implementation="{NAME}"; '
                'load it with attn_implementation="eager"'
            )
        return before(self, requested_attention, *rest, **more)

    checked.checks_iceformer = True  # type: ignore[attr-defined]
    PreTrainedModel.get_correct_attn_implementation = checked  # type: ignore[method-assign]


def register() -> None:
    """Registers the implementation with transformers; done when this module is imported."""
    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, mask)
    _refuse_other_families()


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
