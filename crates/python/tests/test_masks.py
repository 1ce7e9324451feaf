"""Masks that are told rather than written out, where they are changed or copied."""

import copy
import gc
import pickle
import warnings

import iceformer.transformers as hook
import pytest
import torch
from iceformer._masks import _PATTERNS, pattern_of


@pytest.fixture(autouse=True)
def nothing_compiled():
    # Masks are told only where nothing is compiled.
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def told_mask():
    padding = torch.ones(2, 12, dtype=torch.bool)
    padding[1, :3] = False
    return hook.mask(batch_size=2, q_length=12, kv_length=12, attention_mask=padding)


def arrays():
    return [torch.randn(2, 2, 12, 8, generator=torch.Generator().manual_seed(seed)) for seed in range(3)]


def attend(mask):
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="iceformer hands attention over")
        return hook.attention(torch.nn.Module(), *arrays(), mask)[0]


def assert_counts(mask, numbers):
    """`mask` is taken for `numbers`, in rows that see a key."""
    assert torch.equal(mask[:], numbers)
    wanted = torch.nn.functional.scaled_dot_product_attention(*arrays(), attn_mask=numbers).transpose(1, 2)
    seen = numbers.any(-1)[:, 0, :, None, None]
    assert ((attend(mask) - wanted) * seen).abs().nan_to_num().max() < 1e-5


def set_item(mask):
    mask[:, :, 6:, 4] = False


def fill_a_view(mask):
    mask[:, :, 6:][..., 4].fill_(False)


def logical_and(mask):
    mask.logical_and_(torch.eye(12, dtype=torch.bool))


def out_argument(mask):
    torch.logical_and(mask, torch.eye(12, dtype=torch.bool), out=mask)


def masked_fill(mask):
    mask.masked_fill_(torch.ones(12, 12, dtype=torch.bool).tril(-3), False)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("change", [set_item, fill_a_view, logical_and, out_argument, masked_fill])
def test_changes_of_told_masks_count(mode, change):
    with mode():
        mask = told_mask()
        assert isinstance(mask, hook.ToldMask)
        numbers = mask.clone()
        assert_counts(mask, numbers)
        assert pattern_of(mask) is mask.pattern
        for _ in range(2):
            change(mask)
            change(numbers)
            assert_counts(mask, numbers)
        assert not isinstance(pattern_of(mask), hook.MaskPattern)


def pickled(mask):
    return pickle.loads(pickle.dumps(mask))


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("compiled", [False, True], ids=["told", "written"])
@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, pickled])
def test_copies_of_masks(mode, compiled, copied):
    if compiled:
        torch.compile(torch.nn.Identity(), backend="eager")
    with mode():
        mask = told_mask()
        assert isinstance(mask, hook.ToldMask) != compiled
        copy_of_it, numbers = copied(mask), mask.clone()
        assert_counts(copy_of_it, numbers)
        set_item(copy_of_it)
        set_item(numbers)
        assert_counts(copy_of_it, numbers)


def test_patterns_go_with_their_masks():
    torch.compile(torch.nn.Identity(), backend="eager")
    gc.collect()
    before = len(_PATTERNS)
    mask = told_mask()
    assert pattern_of(mask) is _PATTERNS[mask][0] and len(_PATTERNS) == before + 1
    del mask
    gc.collect()
    assert len(_PATTERNS) == before
