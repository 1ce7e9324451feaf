"""Masks for another number of queries or keys than a layer has: what SDPA takes goes on the same, the rest is an error."""

import iceformer.transformers as hook
import pytest
import torch
import transformers as tf
from models import GROUPED, TOKENS, build, decoders, encoders
from transformers.models.minimax.modeling_minimax import MiniMaxCache

IDS = torch.randint(3, 97, (3, 40), generator=torch.Generator().manual_seed(0))
MESSAGE = "the attention mask is for .*expected an attention_mask \\[batch, keys\\] as long as cache and input together"


@pytest.fixture(autouse=True)
def nothing_compiled():
    # Masks are told only where nothing is compiled.
    torch._dynamo.reset()
    with torch.no_grad():
        yield
    torch._dynamo.reset()


def minimax(implementation):
    """Its cache tells nothing of the tokens that its second layer holds."""
    layers = {"layer_types": ["linear_attention", "full_attention"], "head_dim": 16, "block_size": 16}
    config = tf.MiniMaxConfig(**GROUPED, **TOKENS, **layers, num_local_experts=2, num_experts_per_tok=1)
    return build(tf.MiniMaxForCausalLM, config, implementation)


def generate(model, **arguments):
    settings = {"max_new_tokens": 6, "min_new_tokens": 6, "output_logits": True, "return_dict_in_generate": True}
    found = model.generate(IDS, **settings, **arguments)
    return found.sequences, torch.stack(found.logits, dim=1)


def test_a_cache_that_tells_fewer_keys_than_it_holds():
    ours, theirs = minimax("iceformer"), minimax("sdpa")
    sequences, logits = generate(ours)
    assert torch.equal(sequences, generate(theirs)[0])
    # The same without a cache.
    wanted = theirs(sequences, use_cache=False).logits[:, 39:-1]
    assert (logits - wanted).abs().max() < 1e-4
    padding = torch.ones_like(IDS)
    padding[1, :7] = 0
    with pytest.raises(ValueError, match="for 1 queries and 1 keys, and MiniMaxAttention has 1 and 41"):
        generate(ours, attention_mask=padding)
    # SDPA takes the first keys for the last.
    cache = MiniMaxCache()
    ours(IDS[:, :20], past_key_values=cache)
    with pytest.raises(ValueError, match="for 5 queries and 5 keys, and MiniMaxAttention has 5 and 25"):
        ours(IDS[:, 20:25], past_key_values=cache)


def test_with_gradients_enabled_such_a_mask_is_none_too():
    ours, theirs = minimax("iceformer"), minimax("sdpa")
    with torch.enable_grad(), pytest.warns(UserWarning, match="need gradients"):
        hook._warned.clear()
        cache = MiniMaxCache()
        ours(IDS, past_key_values=cache)
        found = ours(IDS[:, :1], past_key_values=cache, position_ids=torch.full((3, 1), 40)).logits
    wanted = theirs(torch.cat([IDS, IDS[:, :1]], dim=1), use_cache=False).logits[:, -1:]
    assert (found - wanted).abs().max() < 1e-4


def test_a_window_of_one():
    # transformers' cache then holds every key and tells of one.
    kind, config = tf.MistralForCausalLM, tf.MistralConfig(**{**GROUPED, "sliding_window": 1}, **TOKENS)
    ours, theirs = build(kind, config, "iceformer"), build(kind, config, "sdpa")
    assert (ours(IDS, use_cache=False).logits - theirs(IDS, use_cache=False).logits).abs().max() < 1e-4
    with pytest.raises(ValueError, match="MistralAttention has 1 and 41.*use_cache=False"):
        generate(ours)
    found, wanted = (generate(model, use_cache=False)[1] for model in (ours, theirs))
    assert (found - wanted).abs().max() < 1e-4


def mask_of(length, padded):
    mask = torch.ones(3, length, dtype=torch.long)
    mask[1, :padded] = 0
    return mask


#: Fewer and more keys, with padding and without; the last masks what there is no key for.
LENGTHS = {
    "fewer": mask_of(30, 0),
    "fewer, padded": mask_of(30, 4),
    "more": mask_of(50, 0),
    "more, padded": mask_of(50, 4),
    "more that are none": torch.cat([mask_of(40, 0), torch.zeros(3, 10, dtype=torch.long)], dim=1),
}


@pytest.mark.parametrize("kind", LENGTHS)
@pytest.mark.parametrize(
    "name, settings",
    [
        ("llama", {"use_cache": False}),
        ("llama", {"use_cache": True}),
        ("mistral", {"use_cache": False}),
        ("mistral", {"use_cache": True}),
        ("bert", {}),
        ("modernbert", {}),
    ],
)
def test_masks_of_another_length(name, settings, kind):
    family = (decoders() | encoders())[name]
    arguments = {"input_ids": IDS, "attention_mask": LENGTHS[kind], **settings}
    ours, theirs = build(*family, "iceformer"), build(*family, "sdpa")
    try:
        wanted = theirs(**arguments)[0]
    except RuntimeError:
        with pytest.raises(ValueError, match=MESSAGE):
            ours(**arguments)
        return
    # Rows that see no key are of no meaning.
    seen = LENGTHS[kind][:, :40].cumsum(1) > 0
    seen = torch.cat([seen, seen[:, -1:].expand(-1, 40 - seen.shape[1])], dim=1)
    assert ((ours(**arguments)[0] - wanted) * seen[..., None]).abs().max() < 1e-4


def test_graphs_over_a_cache_that_tells_fewer_keys_than_it_holds():
    wanted = generate(minimax("sdpa"))[0]
    ours = minimax("iceformer")
    ours.forward = torch.compile(ours.forward, backend="aot_eager")
    assert torch.equal(generate(ours)[0], wanted)
    padding = torch.ones_like(IDS)
    padding[1, :7] = 0
    with pytest.raises(ValueError, match="for 1 keys, and the layer has 41"):
        generate(ours, attention_mask=padding)


@pytest.mark.parametrize("name", ["llama", "bert"])
@pytest.mark.parametrize("length", [30, 50])
def test_compiled_graphs_refuse_them(name, length):
    model = torch.compile(build(*(decoders() | encoders())[name], "iceformer"), backend="aot_eager")
    arguments = {"use_cache": False} if name == "llama" else {}
    with pytest.raises(ValueError, match=f"for {length} keys, and the layer has 40"):
        model(input_ids=IDS, attention_mask=mask_of(length, 4), **arguments)


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_masks_as_long_as_a_static_cache(name):
    kind, config = decoders()[name]
    found = []
    for implementation in ("iceformer", "sdpa"):
        model = build(kind, config, implementation)
        for length in (40, 64):
            cache = tf.StaticCache(config=model.config, max_cache_len=64)
            mask = mask_of(length, 7)
            mask[:, 40:] = 0
            prompt = model(IDS, attention_mask=mask, past_key_values=cache).logits
            mask = mask_of(max(length, 41), 7)
            mask[:, 41:] = 0
            step = model(IDS[:, :1], attention_mask=mask, past_key_values=cache).logits
            found.append(torch.cat([prompt, step], dim=1))
    seen = torch.cat([mask_of(40, 7), torch.ones(3, 1)], dim=1)[..., None]
    for other in found[1:]:
        assert ((found[0] - other) * seen).abs().max() < 1e-4
