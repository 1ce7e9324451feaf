"""Masks of transformers that are told rather than written out: causal, windowed, padded, or a tensor where they are not."""

from __future__ import annotations

import sys
import types
from collections.abc import Callable
from typing import Any

import torch
from torch.utils.weak import WeakTensorKeyDictionary
from transformers import masking_utils

from iceformer import _operator


class MaskPattern:
    """A mask that is told rather than written out.

    The first query stands at key `first_position` (plus `offset`, a tensor, inside compiled graphs). `padding` is
    `[batch, keys]`, True where a key is none. `counts` are the queries and keys that it is for, where they are known;
    `sdpa_has_none` tells whether transformers gives SDPA no mask in its place, which then goes for any number of keys.
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
        counts: tuple[int, int] | None = None,
        sdpa_has_none: Callable[[], bool] | None = None,
    ) -> None:
        self.causal = causal
        self.window = window
        self.first_position = first_position
        self.offset = offset
        self.padding = padding
        self.ranges = ranges
        self.counts = counts
        self._build = build
        self._sdpa_has_none = sdpa_has_none
        self._whole: MaskPattern | None = None
        self._tensor: torch.Tensor | None = None
        self._version = 0

    def tensor(self) -> torch.Tensor:
        """The mask written out, `[batch, 1, tokens, keys]`, for who needs it so."""
        if self._tensor is None:
            self._tensor = self.write_out()
            if not torch.compiler.is_compiling():
                self._version = self._tensor._version
        return self._tensor

    def is_changed(self) -> bool:
        """Whether `tensor()` was changed in place since it was written out: it counts then, and not the pattern."""
        if self._whole is not None and self._whole.is_changed():
            return True
        return self._tensor is not None and self._tensor._version != self._version

    def of_queries(self, start: int, end: int) -> MaskPattern:
        """The pattern of the queries from `start` to `end`; written out it is a view, so that changes of one are
        changes of the other."""
        assert self.counts is not None
        part = MaskPattern(
            self.causal,
            self.window,
            self.first_position + start,
            self.offset,
            self.padding,
            self.ranges,
            lambda: self.tensor()[:, :, start:end],
            (end - start, self.counts[1]),
        )
        part._whole = self
        return part

    def gives_way(self, queries: int, keys: int, layer: str) -> bool:
        """Whether a layer of `queries` and `keys` goes without this mask, which is for other counts: where transformers
        makes none for SDPA. A cache of the model's own (MiniMax) tells fewer keys than it holds, for one.

        Raises:
            ValueError: Where SDPA would have a mask that does not fit, or would take the first keys for the last.
        """
        if self.counts is None or self.counts == (queries, keys):
            return False
        if self.counts[1] == keys and not self.causal and self.window is None:
            # Alike for any number of queries.
            return False
        begins_in_the_middle = self.causal and queries > 1 and keys > queries
        if self._sdpa_has_none is not None and not begins_in_the_middle and self._sdpa_has_none():
            return True
        raise ValueError(
            f"the attention mask is for {self.counts[0]} queries and {self.counts[1]} keys, and {layer} has {queries} "
            f"and {keys}; expected an attention_mask [batch, keys] as long as cache and input together, or none (where "
            "it is, the cache tells another number of keys than it gives: use_cache=False)"
        )

    def write_out(self) -> torch.Tensor:
        """The same, made anew."""
        assert self._build is not None
        if torch.compiler.is_compiling():
            return self._build()
        with torch.inference_mode(False):
            # Inference tensors would not tell when they are changed.
            written = self._build()
            return written.clone() if written.is_inference() else written


class ToldMask(torch.Tensor):
    """A `MaskPattern` in the shape of the 4-D boolean mask that it stands for.

    `generate()` and some models look at a mask, slice it or make it contiguous. Metadata costs nothing, and a slice of
    queries is told too; whatever else touches the numbers gets the mask written out, a plain tensor. Once that is
    changed in place, it is the mask.
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
        if func is torch.Tensor.__getitem__ and isinstance(args[0], ToldMask):
            part = _part(*args)
            if part is not None:
                return part
        numbers = None
        if func in _ADDITIONS:
            numbers = next((part for part in args if isinstance(part, torch.Tensor) and part.is_floating_point()), None)

        def written(told: ToldMask) -> torch.Tensor:
            tensor = told.pattern.tensor()
            if numbers is None:
                return tensor
            # A model that computes its attention itself adds masks to its logits.
            nothing = torch.zeros((), dtype=numbers.dtype, device=tensor.device)
            return torch.where(tensor, nothing, torch.finfo(numbers.dtype).min)

        args, kwargs = torch.utils._pytree.tree_map_only(ToldMask, written, (args, kwargs or {}))
        return func(*args, **kwargs)


def _part(told: ToldMask, index: Any) -> ToldMask | None:
    """`told[index]`, where that leaves some of the queries, in their order, and all of the rest."""
    pattern = told.pattern
    index = index if isinstance(index, tuple) else (index,)
    if pattern.counts is None or pattern.is_changed() or len(index) > 4:
        return None
    if not all(isinstance(part, slice) and part.step in (None, 1) for part in index):
        return None
    batch, one, queries, keys = told.shape
    spans = [part.indices(size)[:2] for part, size in zip(index, told.shape)]
    spans += [(0, size) for size in told.shape[len(index) :]]
    (start, end) = spans.pop(2)
    if spans != [(0, batch), (0, one), (0, keys)] or start >= end:
        return None
    return ToldMask.of(pattern.of_queries(start, end), (batch, one, end - start, keys), told.device)


def pattern_of(attention_mask: MaskPattern | torch.Tensor | None) -> MaskPattern | torch.Tensor | None:
    """The pattern that a mask stands for, or the mask itself."""
    if isinstance(attention_mask, ToldMask):
        pattern = attention_mask.pattern
        return pattern.tensor() if pattern.is_changed() else pattern
    if not isinstance(attention_mask, torch.Tensor) or torch.compiler.is_compiling():
        return attention_mask
    pattern, version = _PATTERNS.get(attention_mask, (None, None))
    # Numbers changed in place are no longer those of the pattern.
    return attention_mask if pattern is None or version != attention_mask._version else pattern


#: The patterns of masks that were written out, and their versions then. No attributes of the tensors: copies would take
#: them along, and pickles could not.
_PATTERNS = WeakTensorKeyDictionary()


def _written_with(pattern: MaskPattern) -> torch.Tensor:
    """The mask written out, a plain tensor whose pattern `pattern_of` finds."""
    written = pattern.write_out()
    _PATTERNS[written] = (pattern, written._version)
    return written


def _something_is_compiled() -> bool:
    """Whether torch.compile was called in this process: masks made outside of a graph may then go into one, which takes
    plain tensors only and keeps the strides that they had."""
    frames = sys.modules.get("torch._dynamo.eval_frame")
    # torch.compiler.disable leaves a None there.
    return frames is not None and any(map(callable, getattr(frames, "cached_backends", {}).values()))


def only_selected(
    indices: torch.Tensor,
    attention_mask: MaskPattern | torch.Tensor | None,
    query: torch.Tensor,
    key: torch.Tensor,
    causal: bool,
) -> torch.Tensor:
    """`attention_mask` without the keys that are not in `indices` `[batch, tokens, selected]` (DeepSeek V3.2's sparse
    attention, arXiv 2512.02556).

    Raises:
        ValueError: For indices of another shape.
    """
    batch, _, tokens, _ = query.shape
    if indices.ndim != 3 or tuple(indices.shape[:2]) != (batch, tokens):
        raise ValueError(
            f"the indices of selected keys are of shape {tuple(indices.shape)}; expected [{batch}, {tokens}, selected]: "
            'load the model with attn_implementation="sdpa" or "eager"'
        )
    nothing = torch.zeros((batch, tokens, key.shape[2]), dtype=torch.bool, device=key.device)
    selected = nothing.scatter(-1, indices.long(), True)[:, None]
    if isinstance(attention_mask, MaskPattern):
        attention_mask = attention_mask.tensor()
    if attention_mask is None:
        return selected & torch.ones_like(selected).tril() if causal and tokens > 1 else selected
    if attention_mask.dtype == torch.bool:
        return attention_mask & selected
    return attention_mask.masked_fill(~selected, torch.finfo(attention_mask.dtype).min)


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
    """The mask function registered with transformers: a `ToldMask` (inside compiled graphs a `MaskPattern`, and written
    out outside of them where there are any), or SDPA's own mask where there is no pattern.

    Raises:
        ValueError: When `attention_mask` has another number of dimensions than 2 and masks something.
    """
    if isinstance(q_offset, torch.Tensor):
        # A static cache's own count, which each layer moves on in place before the mask is read or written out.
        q_offset = q_offset.clone()

    def for_sdpa(causal_skip: bool, bidirectional_skip: bool) -> torch.Tensor | None:
        return masking_utils.sdpa_mask(
            batch_size=batch_size,
            q_length=q_length,
            kv_length=kv_length,
            q_offset=q_offset,  # type: ignore[arg-type]
            kv_offset=kv_offset,
            mask_function=mask_function,
            attention_mask=attention_mask,
            local_size=local_size,
            allow_is_causal_skip=causal_skip,
            allow_is_bidirectional_skip=bidirectional_skip,
            use_vmap=use_vmap,
            device=device,
            **more,
        )

    def write_out() -> torch.Tensor:
        written = for_sdpa(False, False)
        assert written is not None
        return written

    def sdpa_has_none() -> bool:
        # A single query would see the padding among the keys that it was not told of.
        if q_length == 1 and attention_mask is not None and not attention_mask.all():
            return False
        return for_sdpa(allow_is_causal_skip, allow_is_bidirectional_skip) is None

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
    if attention_mask is not None and attention_mask.ndim != 2:
        # As for SDPA, one that masks nothing may have any shape.
        if compiling or not attention_mask.all():
            raise ValueError(
                f"attention_mask has {attention_mask.ndim} dimensions, {tuple(attention_mask.shape)}; expected "
                "[batch, keys], or [batch, 1, tokens, keys]"
            )
        attention_mask = None
    elif attention_mask is not None:
        padding = masking_utils.prepare_padding_mask(attention_mask, kv_length, kv_offset)
        assert padding is not None
        padding = padding[:, kv_offset : kv_offset + kv_length]
    if compiling:
        offset, first = (q_offset, -kv_offset) if isinstance(q_offset, torch.Tensor) else (None, q_offset - kv_offset)
        # The counts of a padding are compared when the graph runs.
        counts = (q_length, kv_length) if padding is None else None
        return MaskPattern(causal, window, first, offset, padding, None, write_out, counts, sdpa_has_none)
    first = int(q_offset) - int(kv_offset)
    if first < 0:
        return write_out()
    try:
        ranges = None if padding is None else _operator.padding_ranges(padding.cpu())
    except ValueError:
        return write_out()
    told = MaskPattern(causal, window, first, None, padding, ranges, write_out, (q_length, kv_length), sdpa_has_none)
    if _something_is_compiled():
        return _written_with(told)
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


def pattern_of_key_mask(mask: torch.Tensor, keys: int) -> MaskPattern | torch.Tensor:
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


__all__ = ["MaskPattern", "ToldMask", "mask", "only_selected", "pattern_of", "pattern_of_key_mask"]
