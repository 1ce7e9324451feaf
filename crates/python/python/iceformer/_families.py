"""Families of transformers that cannot take another implementation of attention than those they were written for."""

from __future__ import annotations

import functools
from typing import Any

from transformers import PreTrainedModel

#: The name that `attn_implementation` takes.
NAME = "iceformer"

#: Layers that edit their mask in a way of their own: those of DeepSeek V4 join numbers to it, though for every name but
#: "eager" a mask is boolean; those of MiniMax M3 mask the blocks they leave out for "eager" and "sdpa" alone.
_EDIT_THEIR_MASKS = {"compressed_sparse_attention", "heavily_compressed_attention", "minimax_m3_sparse"}


def takes_implementation(model: type[PreTrainedModel] | PreTrainedModel) -> bool:
    """Whether models of this family let an attention implementation compute their attention. Others go on with code of
    their own, to which our masks mean nothing."""
    return bool(getattr(model, "_supports_attention_backend", False) or getattr(model, "_supports_sdpa", False))


def _reason_to_refuse(model: PreTrainedModel) -> str | None:
    if not takes_implementation(model):
        return "has no attention, or computes its attention itself,"
    edited = _EDIT_THEIR_MASKS.intersection(getattr(model.config, "layer_types", None) or ())
    if edited:
        return f"has layers ({', '.join(sorted(edited))}) that edit their masks for other implementations"
    return None


def refuse_other_families() -> None:
    """transformers refuses SDPA for families that compute their attention themselves, but takes any other name for
    them: here it refuses ours too."""
    before = PreTrainedModel.get_correct_attn_implementation
    if getattr(before, "checks_iceformer", False):
        return

    @functools.wraps(before)
    def checked(self: PreTrainedModel, requested_attention: str | None, *rest: Any, **more: Any) -> str:
        reason = _reason_to_refuse(self) if requested_attention == NAME else None
        if reason is not None:
            instead = "sdpa" if self._supports_sdpa else "eager"
            raise ValueError(
                f'{type(self).__name__} {reason} and cannot take attn_implementation="{NAME}"; load it with '
                f'attn_implementation="{instead}"'
            )
        return before(self, requested_attention, *rest, **more)

    checked.checks_iceformer = True  # type: ignore[attr-defined]
    PreTrainedModel.get_correct_attn_implementation = checked  # type: ignore[method-assign]


__all__ = ["NAME", "refuse_other_families", "takes_implementation"]
