"""Attention on arrays, and a cache for incremental use."""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from iceformer import _arrays, _core
from iceformer._core import Report


def options(
    *,
    method: str = "auto",
    budget: float | None = None,
    causal: bool = False,
    window: int | None = None,
    scale: float,
    first_position: int = 0,
    key_ranges: Sequence[tuple[int, int]] | None = None,
    soft_cap: float | None = None,
    sinks: Sequence[float] | None = None,
    kv_type: str = "auto",
    threads: int | None = None,
) -> dict[str, Any]:
    """Checked settings as the native half takes them."""
    method, budget = method_and_budget(method, budget)
    return {
        "method": method,
        "budget": budget,
        "causal": truth("causal", causal),
        "window": None if window is None else whole_number("window", window, least=1),
        "scale": finite_number("scale", scale),
        "first_position": whole_number("first_position", first_position),
        "key_ranges": key_ranges,
        "soft_cap": None if soft_cap is None else finite_number("soft_cap", soft_cap),
        "sinks": sinks,
        "kv_type": choice("kv_type", kv_type, KV_TYPES),
        "threads": thread_count(threads),
    }


#: Above any number of tokens, with room for sums.
MOST = 2**48


#: What errors say is expected.
METHODS = '"auto", "exact", "budgeted" or "dci"'
KV_TYPES = '"auto", "f32", "bf16" or "int8"'

#: The methods to which a budget means nothing.
WITHOUT_BUDGET = ("exact", "dci")


def choice(name: str, value: Any, expected: str) -> str:
    """`value`, when it is a text; which one is checked by the native half."""
    if not isinstance(value, str):
        raise TypeError(f"{name} is {value!r}; expected {expected}")
    return value


def method_and_budget(method: Any, budget: Any) -> tuple[str, float | None]:
    """Both, when the method is a text and heeds a budget where one is given; the native half checks the rest."""
    method = choice("method", method, METHODS)
    if budget is None:
        return method, None
    if method in WITHOUT_BUDGET:
        raise ValueError(
            f'budget is {budget} and method {method!r}, which has none; expected method "budgeted" or "auto", or no budget'
        )
    return method, real_number("budget", budget)


def real_number(name: str, value: Any) -> float:
    """`value`, when it is a number, as are arrays and tensors of one element; texts are none."""
    try:
        if not isinstance(value, (str, bytes, bytearray)):
            return float(value)
    except (TypeError, ValueError, RuntimeError):
        # Arrays and tensors of several numbers raise each their own.
        pass
    raise TypeError(f"{name} is {value!r}; expected a number")


def finite_number(name: str, value: Any) -> float:
    """`value`, when it is a number that float32 has, in which everything is computed."""
    number = real_number(name, value)
    if not abs(number) <= _LARGEST:
        raise ValueError(f"{name} is {number}; expected a finite number of float32, at most {_LARGEST:.3g}")
    return number


_LARGEST = float(np.finfo(np.float32).max)


def truth(name: str, value: Any) -> bool:
    """`value`, when it is a bool, as are numbers, None, and arrays of one element; a text or a mask is none."""
    try:
        if not isinstance(value, (str, bytes, bytearray, list, tuple, dict)):
            return bool(value)
    except (TypeError, ValueError, RuntimeError):
        # Arrays and tensors of several numbers raise each their own.
        pass
    raise TypeError(f"{name} is a {type(value).__name__}; expected True or False")


def whole_number(name: str, value: Any, most: int = MOST, least: int = 0) -> int:
    """`value`, when it is a whole number from `least` to `most`."""
    try:
        number = operator.index(value)
    except TypeError:
        raise TypeError(f"{name} is a {type(value).__name__}; expected a whole number") from None
    if not least <= number <= most:
        raise ValueError(f"{name} is {number}; expected {f'{least} or more' if number < least else f'at most {most}'}")
    return number


def thread_count(threads: int | None) -> int:
    """`threads`, or as many as the process may use."""
    if threads is None:
        return _core.available_threads()
    try:
        threads = operator.index(threads)
    except TypeError:
        found = f"{threads!r}, a {type(threads).__name__}"
        raise TypeError(f"threads is {found}; expected a whole number from 1 to 1024") from None
    if not 1 <= threads <= 1024:
        raise ValueError(f"threads is {threads}; expected 1 to 1024, or None for all cores")
    return threads


def _key_ranges(key_lengths: Any, batch: int, keys: int) -> list[tuple[int, int]]:
    """First and one-past-last key of each entry of the batch."""
    key_lengths = as_list("key_lengths", key_lengths, "a length or (start, end) for each entry of the batch")
    if len(key_lengths) != batch:
        raise ValueError(f"key_lengths has {len(key_lengths)} entries for a batch of {batch}; expected one for each")
    ranges = []
    for index, entry in enumerate(key_lengths):
        pair = tuple(entry) if isinstance(entry, (tuple, list)) or getattr(entry, "ndim", 0) == 1 else (0, entry)
        if len(pair) != 2:
            raise ValueError(f"key_lengths[{index}] is {entry!r}; expected a length or (start, end)")
        try:
            start, end = (operator.index(bound) for bound in pair)
        except TypeError:
            raise TypeError(
                f"key_lengths[{index}] is {entry!r}; expected a length or (start, end) of whole numbers"
            ) from None
        if not 0 <= start <= end <= keys:
            raise ValueError(f"key_lengths[{index}] is {entry!r}; expected 0 <= start <= end <= {keys}, the keys given")
        ranges.append((start, end))
    return ranges


def attention(
    queries: Any,
    keys: Any,
    values: Any,
    *,
    method: str = "auto",
    budget: float | None = None,
    causal: bool = False,
    scale: float | None = None,
    window: int | None = None,
    key_lengths: Sequence[int | tuple[int, int]] | None = None,
    first_position: int | None = None,
    soft_cap: float | None = None,
    sinks: Any = None,
    kv_type: str = "auto",
    threads: int | None = None,
    return_report: bool = False,
) -> Any:
    """Attention: `softmax(scale · queries · keysᵀ + mask) · values`.

    Takes NumPy arrays or torch tensors on the CPU, all of one library, of float32, float16 or bfloat16, with any
    strides; they are not copied. The interpreter is released while it computes, and several threads may call at once
    (their calls share the team of threads and take turns).

    Args:
        queries: `[batch, query_heads, tokens, key_dim]`.
        keys: `[batch, kv_heads, keys, key_dim]`; `kv_heads` divides `query_heads` (grouped queries).
        values: `[batch, kv_heads, keys, value_dim]`.
        method: `"exact"`; `"budgeted"` (the keys that matter, within `budget`); `"dci"` (IceFormer as published,
            arXiv 2405.02842); `"auto"`: budgeted where a budget is given, else exact.
        budget: Softmax mass that a row may miss, above 0 up to 1; .05 unless given (method budgeted; an error with
            `"exact"` and `"dci"`, which have none). About one row in a hundred of those that are measured may miss
            more: rare rows that look for single keys can be lost.
        causal: A query sees keys up to its own position only. Unlike in torch's SDPA the *last* query stands at the
            last key, so that a chunk behind a cache needs nothing else.
        scale: Factor on the logits; `1/√key_dim` unless given.
        window: A query sees keys less than this many positions away only (behind it, when causal).
        key_lengths: For each entry of the batch the number of keys that are no padding (padding on the right), or
            `(start, end)`.
        first_position: Position of the first query among the keys; `keys − tokens` (or 0, if that is negative) unless
            given.
        soft_cap: Logits become `soft_cap · tanh(logit / soft_cap)`, as in Gemma 2.
        sinks: `[query_heads]`, one more logit for each head that takes its share of the softmax and has no value.
        kv_type: What keys and values are packed in: `"f32"`, `"bf16"`, `"int8"`, or `"auto"`: bf16 for bfloat16 on
            a machine that is fast at it, else f32, so that no key or value is rounded. With keys in bf16, queries are
            rounded to it too, after `scale` is applied to them: where logits are large (a standard deviation of 8) the
            largest error of a bfloat16 result is then several times that of SDPA, which `"f32"` avoids. With method
            budgeted, 512 queries and enough keys, `"auto"` is the type that the machine is fastest with (int8, or bf16
            with AMX) where some rows show that rounding leaves most of the budget; the report's `rounded_rows` tells.
            A call of up to four queries (a decode step) reads keys and values in place, and rounds nothing.
        threads: Threads to use; all cores that the process may use unless given.
        return_report: Whether to return `(output, Report)`.

    Returns:
        `[batch, query_heads, tokens, value_dim]` in the library and type of `queries`: a view of memory in the order
        `[batch, tokens, query_heads, value_dim]`, without gradients. A query that sees no key gets zeros. A NaN in a
        key or value makes at least the rows that see it NaN (method dci: the rows that keep it); an infinity makes them
        NaN or infinite, unless it makes the logit of its key −∞, which hides the key. Either may also reach nearby rows
        that do not see it, and packed as int8 whatever shares a scale with it.

    Raises:
        TypeError: For other types of arrays or numbers.
        ValueError: For shapes that do not fit together or settings out of range.
    """
    found = _one_type(queries=queries, keys=keys, values=values)
    packed = (
        _arrays.operand("queries", queries, found),
        _arrays.operand("keys", keys, found),
        _arrays.operand("values", values, found),
    )
    batch, heads, tokens, width = packed[0][2]
    key_count = packed[1][2][2]
    if scale is None:
        scale = 1.0 / math.sqrt(width) if width else 1.0
    if first_position is None:
        first_position = max(key_count - tokens, 0)
    settings = options(
        method=method,
        budget=budget,
        causal=causal,
        window=window,
        scale=scale,
        first_position=first_position,
        key_ranges=None if key_lengths is None else _key_ranges(key_lengths, batch, key_count),
        soft_cap=soft_cap,
        sinks=None if sinks is None else _sinks(sinks),
        kv_type=kv_type,
        threads=threads,
    )
    result, memory = _arrays.empty_like(queries, found, (batch, tokens, heads, packed[2][2][3]))
    report = _core.attend(*packed, memory, settings)
    result = _arrays.transpose(result, 1, 2)
    return (result, report) if return_report else result


def _sinks(sinks: Any) -> list[float]:
    listed = as_list("sinks", sinks, "a number for each query head")
    return [real_number(f"sinks[{head}]", sink) for head, sink in enumerate(listed)]


def as_list(name: str, values: Any, expected: str) -> list[Any]:
    """`values` as a list; what is none, or a text, is an error that says what is `expected`."""
    listed = values.tolist() if hasattr(values, "tolist") else values
    # A text would come apart into letters.
    if isinstance(listed, (str, bytes)) or not isinstance(listed, Iterable):
        raise TypeError(f"{name} is {values!r}; expected {expected}")
    return list(listed)


def _one_type(**arrays: Any) -> str:
    """The element type that `arrays`, all of one library, have in common."""
    kinds = [_arrays.type_name(name, array) for name, array in arrays.items()]
    if len(set(map(type, arrays.values()))) > 1 and len(set(map(_arrays.is_tensor, arrays.values()))) > 1:
        raise TypeError(
            "some of " + ", ".join(arrays) + " are NumPy arrays, others torch tensors; expected one library"
        )
    if len(set(kinds)) > 1:
        found = ", ".join(f"{name} of {kind}" for name, kind in zip(arrays, kinds))
        raise TypeError(f"{found}; expected one element type")
    return kinds[0]


class KeyValueCache:
    """Packed keys and values of one sequence, for incremental use: append what comes, attend from new queries.

    ```python
    cache = iceformer.KeyValueCache(kv_heads=8, key_dim=64, kv_type="int8")
    cache.append(keys, values)              # [8, tokens, 64] each
    output = cache.attend(queries)          # [32, tokens, 64]
    ```

    Args:
        kv_heads: Key/value heads.
        key_dim: Width of a key (and a query).
        value_dim: Width of a value; `key_dim` unless given.
        kv_type: `"f32"` (also `"auto"`), `"bf16"` or `"int8"` (one scale for each key and value; a quarter of the
            memory).
    """

    def __init__(self, kv_heads: int, key_dim: int, value_dim: int | None = None, kv_type: str = "auto") -> None:
        kv_heads, key_dim = whole_number("kv_heads", kv_heads, least=1), whole_number("key_dim", key_dim, least=1)
        value_dim = key_dim if value_dim is None else whole_number("value_dim", value_dim, least=1)
        self._cache = _core.Cache(kv_heads, key_dim, value_dim, choice("kv_type", kv_type, KV_TYPES))

    def __copy__(self) -> KeyValueCache:
        raise TypeError("a KeyValueCache cannot be copied: both would append to the same keys")

    def __reduce_ex__(self, _: Any) -> Any:
        # What copy.deepcopy and pickle ask for.
        raise TypeError(
            "a KeyValueCache cannot be copied or pickled; append the keys and values to a new one, in the process that "
            "attends to them"
        )

    def append(self, keys: Any, values: Any, *, threads: int | None = None) -> None:
        """Appends `keys` `[kv_heads, tokens, key_dim]` and `values` `[kv_heads, tokens, value_dim]`."""
        found = _one_type(keys=keys, values=values)
        packed = (_arrays.operand("keys", keys, found, 3), _arrays.operand("values", values, found, 3))
        self._cache.append(*packed, thread_count(threads))

    def attend(
        self,
        queries: Any,
        *,
        method: str = "auto",
        budget: float | None = None,
        causal: bool = True,
        scale: float | None = None,
        window: int | None = None,
        first_position: int | None = None,
        threads: int | None = None,
        return_report: bool = False,
    ) -> Any:
        """Attention of `queries` `[query_heads, tokens, key_dim]`, the last of which stands at the last key unless
        `first_position` says where the first one stands. Gives `[query_heads, tokens, value_dim]`; the other arguments
        are those of `iceformer.attention`."""
        found = _one_type(queries=queries)
        packed = _arrays.operand("queries", queries, found, 3)
        _, heads, tokens, width = packed[2]
        settings = options(
            method=method,
            budget=budget,
            causal=causal,
            window=window,
            scale=1.0 / math.sqrt(self.key_dim) if scale is None else scale,
            threads=threads,
        )
        result, memory = _arrays.empty_like(queries, found, (tokens, heads, self.value_dim))
        position = None if first_position is None else whole_number("first_position", first_position)
        report = self._cache.attend(packed, memory, settings, position)
        result = _arrays.transpose(result, 0, 1)
        return (result, report) if return_report else result

    def truncate(self, length: int) -> None:
        """Drops all tokens from `length` on; nothing happens when fewer are held."""
        self._cache.truncate(whole_number("length", length))

    def __len__(self) -> int:
        return len(self._cache)

    @property
    def nbytes(self) -> int:
        """Bytes held, those that there is room for included: 512 tokens at a time, or a sixteenth of what is held."""
        return self._cache.nbytes

    @property
    def kv_heads(self) -> int:
        """Key/value heads."""
        return self._cache.shape[0]

    @property
    def key_dim(self) -> int:
        """Width of a key."""
        return self._cache.shape[1]

    @property
    def value_dim(self) -> int:
        """Width of a value."""
        return self._cache.shape[2]

    @property
    def kv_type(self) -> str:
        """`"f32"`, `"bf16"` or `"int8"`."""
        return self._cache.kv_type

    def __repr__(self) -> str:
        heads, key_dim, value_dim = self._cache.shape
        return (
            f"KeyValueCache(kv_heads={heads}, key_dim={key_dim}, value_dim={value_dim}, kv_type={self.kv_type!r}, "
            f"tokens={len(self)})"
        )


__all__ = ["KeyValueCache", "Report", "attention"]
