"""The torch operator `iceformer::attention`, which torch.compile and torch.export take as one step."""

from __future__ import annotations

import threading
from typing import Any

import torch

from iceformer import _arrays, _core
from iceformer._attention import options

#: The report of the last attention call of each thread, as `last`; see `iceformer.transformers.last_report`.
reports = threading.local()


def padding_ranges(padding: torch.Tensor | None) -> list[tuple[int, int]] | None:
    """First and one-past-last key of each row of `padding` `[batch, keys]` (True: no padding); None where nothing is
    padded.

    Raises:
        ValueError: When a row has padding between its keys.
    """
    if padding is None:
        return None
    rows = padding.detach().numpy()
    if rows.all():
        return None
    counts = rows.sum(axis=1)
    starts = rows.argmax(axis=1) if rows.shape[1] else counts
    ranges = [(int(start), int(start + count)) for start, count in zip(starts, counts)]
    if not all(row[start:end].all() for row, (start, end) in zip(rows, ranges)):
        raise ValueError("padding between the keys of a row")
    return ranges


def run(
    queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, settings: dict[str, Any]
) -> tuple[torch.Tensor, _core.Report]:
    """Attention without the operator: `[batch, tokens, query_heads, value_dim]` and the report."""
    arrays = {"queries": queries, "keys": keys, "values": values}
    packed = [_arrays.operand(name, array, _arrays.type_name(name, array)) for name, array in arrays.items()]
    shape = (queries.shape[0], queries.shape[2], queries.shape[1], values.shape[3])
    result, memory = _arrays.empty_like(queries, packed[0][1], shape)
    return result, _core.attend(*packed, memory, settings)


@torch.library.custom_op("iceformer::attention", mutates_args=(), device_types="cpu")
def attention(
    queries: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    padding: torch.Tensor | None,
    offset: torch.Tensor | None,
    sinks: torch.Tensor | None,
    first_position: int,
    causal: bool,
    window: int,
    scale: float,
    soft_cap: float,
    method: str,
    budget: float,
    kv_type: str,
    threads: int,
) -> torch.Tensor:
    """Attention of `queries` `[batch, query_heads, tokens, key_dim]`; gives `[batch, tokens, query_heads, value_dim]`.

    `padding` is `[batch, keys]`, True where a key is none; `offset` is added to `first_position`; for `window`,
    `soft_cap` and `budget` 0 stands for none. The rest is as in `iceformer.attention`.

    Raises:
        ValueError: When `padding` is for another number of keys.
    """
    if padding is not None and padding.shape[1] != keys.shape[2]:
        raise ValueError(
            f"the attention mask is for {padding.shape[1]} keys, and the layer has {keys.shape[2]}; expected an "
            "attention_mask [batch, keys] as long as cache and input together, or none"
        )
    # A graph that runs has no report to give, and one of an earlier call would be taken for its own.
    reports.last = None
    first = first_position + (0 if offset is None else int(offset))
    try:
        key_ranges = padding_ranges(padding)
    except ValueError:
        return _by_definition(queries, keys, values, padding, first, causal, window, scale, soft_cap, sinks)
    settings = options(
        method=method,
        budget=budget or None,
        causal=causal,
        window=window or None,
        scale=scale,
        first_position=first,
        key_ranges=key_ranges,
        soft_cap=soft_cap or None,
        sinks=None if sinks is None else sinks.detach().float().tolist(),
        kv_type=kv_type,
        threads=threads or torch.get_num_threads(),
    )
    return run(queries, keys, values, settings)[0]


@attention.register_fake
def _(queries, keys, values, *_):  # type: ignore[no-untyped-def]
    return queries.new_empty((queries.shape[0], queries.shape[2], queries.shape[1], values.shape[3]))


def _by_definition(
    queries: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    padding: torch.Tensor | None,
    first: int,
    causal: bool,
    window: int,
    scale: float,
    soft_cap: float,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    """Padding in the middle of a row: the mask is written out."""
    query = torch.arange(queries.shape[2])[:, None] + first
    key = torch.arange(keys.shape[2])[None, :]
    mask = torch.ones(queries.shape[2], keys.shape[2], dtype=torch.bool)
    if causal:
        mask &= key <= query
    if window:
        mask &= (key - query).abs() < window
    if padding is not None:
        mask = mask & padding[:, None, None, :]
    return eager(queries, keys, values, mask, scale, soft_cap or None, sinks)


def eager(
    queries: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    mask: torch.Tensor | None,
    scale: float,
    soft_cap: float | None = None,
    sinks: torch.Tensor | None = None,
    dropout: float = 0.0,
) -> torch.Tensor:
    """Attention by its definition in torch: any mask (boolean, or added to the logits), differentiable. Gives
    `[batch, tokens, query_heads, value_dim]`."""
    group = queries.shape[1] // keys.shape[1]
    keys, values = keys.repeat_interleave(group, dim=1), values.repeat_interleave(group, dim=1)
    logits = torch.matmul(queries, keys.transpose(2, 3)) * scale
    if soft_cap is not None:
        logits = soft_cap * torch.tanh(logits / soft_cap)
    if mask is not None:
        if mask.dtype == torch.bool:
            logits = logits.masked_fill(~mask, torch.finfo(logits.dtype).min)
        else:
            logits = logits + mask
    if sinks is not None:
        more = sinks.reshape(1, -1, 1, 1).expand(logits.shape[0], -1, logits.shape[2], 1).to(logits.dtype)
        logits = torch.cat([logits, more], dim=-1)
    weights = torch.softmax(logits.float(), dim=-1).to(queries.dtype)
    if sinks is not None:
        weights = weights[..., :-1]
    weights = torch.nn.functional.dropout(weights, p=dropout, training=dropout > 0)
    return torch.matmul(weights, values).transpose(1, 2).contiguous()


__all__ = ["attention", "eager", "padding_ranges", "reports", "run"]
