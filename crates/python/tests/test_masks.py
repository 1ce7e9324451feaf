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


def assert_told(mask):
    """It was not written out so far, nor was what it is a part of."""
    assert isinstance(mask, hook.ToldMask) and mask.pattern._tensor is None
    assert mask.pattern._whole is None or mask.pattern._whole._tensor is None


@pytest.mark.parametrize("part", [slice(-1, None), slice(-5, None), slice(3, 7), slice(-99, 99)])
def test_slices_of_queries_are_told_too(part):
    wanted = attend(told_mask()[:])[:, part]
    for index in ((slice(None), slice(None), part, slice(None)), (slice(None), slice(None), part)):
        mask = told_mask()
        sliced = mask[index]
        assert_told(mask)
        assert_told(sliced)
        assert sliced.shape == mask[:].clone()[index].shape
        mask = told_mask()
        queries, keys, values = arrays()
        found = hook.attention(torch.nn.Module(), queries[:, :, part], keys, values, mask[index])[0]
        assert_told(mask)
        # The rows of the padding see no key.
        seen = told_mask().clone()[index].any(-1)[:, 0, :, None, None]
        assert ((found - wanted) * seen).abs().nan_to_num().max() < 1e-5
        assert torch.equal(mask[index][:, :, :1][:, :, :, :5], told_mask().clone()[index][:, :, :1, :5])


@pytest.mark.parametrize("index", [0, (slice(1),), (..., slice(5)), (slice(None),) * 2 + (slice(0, 9, 2),), None])
def test_other_slices_are_written_out(index):
    assert type(told_mask()[index]) is torch.Tensor
    assert torch.equal(told_mask()[index], told_mask().clone()[index])


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_changes_of_slices_are_changes_of_the_whole(mode):
    with mode():
        for change_the_whole in (False, True):
            mask = told_mask()
            numbers = mask.clone()
            sliced = mask[:, :, 6:]
            (mask[:, :, 6:] if change_the_whole else sliced)[..., 4] = False
            numbers[:, :, 6:, 4] = False
            assert_counts(mask, numbers)
            assert torch.equal(sliced.clone(), numbers[:, :, 6:])
            assert not isinstance(pattern_of(sliced), hook.MaskPattern)


def test_layers_that_share_keys_write_no_masks_out(monkeypatch):
    import transformers as tf
    from models import GROUPED, TOKENS, build

    # What its last layers compute is wanted for the last query alone.
    config = tf.Gemma4TextConfig(
        **{**GROUPED, "num_hidden_layers": 4},
        **TOKENS,
        head_dim=16,
        global_head_dim=32,
        sliding_window=9,
        layer_types=["sliding_attention", "full_attention"] * 2,
        vocab_size_per_layer_input=97,
        hidden_size_per_layer_input=16,
        num_kv_shared_layers=2,
    )
    ours, theirs = (build(tf.Gemma4ForCausalLM, config, name) for name in ("iceformer", "sdpa"))
    ids = torch.randint(3, 97, (3, 40), generator=torch.Generator().manual_seed(0))
    padding = torch.ones_like(ids)
    padding[1, :7] = 0
    arguments = {"attention_mask": padding, "max_new_tokens": 8, "min_new_tokens": 8}
    wanted = theirs.generate(ids, **arguments)
    written = []
    write_out = hook.MaskPattern.write_out
    monkeypatch.setattr(hook.MaskPattern, "write_out", lambda self: written.append(self) or write_out(self))
    assert torch.equal(ours.generate(ids, **arguments), wanted) and not written


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
