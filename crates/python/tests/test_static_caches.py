"""Static caches count their tokens in place, after masks are asked for and before masks are read."""

import iceformer.transformers  # noqa: F401, registers the implementation
import pytest
import torch
import transformers as tf
from models import build, decoders, oracle

IDS = torch.randint(3, 97, (3, 24), generator=torch.Generator().manual_seed(3))


@pytest.fixture(autouse=True)
def nothing_compiled():
    # Masks are written out later only where nothing is compiled.
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def prompt_in_parts(forward, config):
    """Logits of a prompt that is read in parts over one static cache."""
    cache, parts = tf.StaticCache(config=config, max_cache_len=40), []
    for start, end in [(0, 8), (8, 15), (15, 16), (16, 24)]:
        mask = torch.ones(3, end, dtype=torch.long)
        parts.append(forward(input_ids=IDS[:, start:end], attention_mask=mask, past_key_values=cache).logits.detach())
    return torch.cat(parts, dim=1)


@pytest.mark.parametrize("name", ["llama", "gemma2", "gemma3"])
def test_parts_with_gradients_enabled(name):
    kind, config = decoders()[name]
    wanted = build(kind, config, oracle(name))(IDS).logits.detach()
    model = build(kind, config, "iceformer")
    with pytest.warns(UserWarning, match="need gradients"):
        iceformer.transformers._warned.clear()
        found = prompt_in_parts(model, model.config)
    assert (found - wanted).abs().max() < 1e-4


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_parts_in_compiled_graphs(name):
    kind, config = decoders()[name]
    with torch.no_grad():
        wanted = build(kind, config, oracle(name))(IDS).logits
        model = build(kind, config, "iceformer")
        found = prompt_in_parts(torch.compile(model, backend="aot_eager"), model.config)
    assert (found - wanted).abs().max() < 1e-4


def test_t5_generates_the_same():
    config = tf.T5Config(
        vocab_size=97,
        d_model=64,
        d_kv=16,
        d_ff=96,
        num_layers=2,
        num_heads=4,
        decoder_start_token_id=0,
        pad_token_id=0,
        eos_token_id=2,
    )
    arguments = {"max_new_tokens": 12, "output_logits": True, "return_dict_in_generate": True}
    ours, theirs = (build(tf.T5ForConditionalGeneration, config, name) for name in ("iceformer", "sdpa"))
    found = ours.generate(IDS, cache_implementation="static", disable_compile=True, **arguments)
    wanted = theirs.generate(IDS, **arguments)
    assert torch.equal(found.sequences, wanted.sequences)
    assert (torch.stack(found.logits) - torch.stack(wanted.logits)).abs().max() < 1e-4
