"""Attention under `torch.autocast`, where rotary embeddings and norms leave queries and keys in float32 and values come
in the narrow type."""

import warnings

import iceformer.transformers as hook
import pytest
import torch
import transformers as tf
from models import build, decoders, encoders, oracle

MODELS = decoders() | encoders()
IDS = torch.randint(3, 97, (3, 24), generator=torch.Generator().manual_seed(3))


@pytest.fixture(autouse=True)
def inference():
    with torch.no_grad(), warnings.catch_warnings():
        warnings.filterwarnings("error", message="iceformer hands attention over")
        hook._warned.clear()
        torch._dynamo.reset()
        yield
        torch._dynamo.reset()


def error_and_bound(model, name):
    """The mean error of a model under autocast, and twice that of the same model without IceFormer."""
    kind, config = MODELS[name]
    theirs = build(kind, config, oracle(name))
    wanted = theirs(IDS)[0]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found, other = model(IDS)[0], theirs(IDS)[0]
    return (found.float() - wanted).abs().mean(), 2 * (other.float() - wanted).abs().mean()


# Not gpt-oss, whose tokens go to another expert for a rounding.
@pytest.mark.parametrize("name", [name for name in MODELS if name != "gpt-oss"])
def test_attention_is_computed_here(name):
    model = build(*MODELS[name], "iceformer")
    hook._reports.last = None
    error, bound = error_and_bound(model, name)
    assert hook.last_report() is not None
    assert error < bound


def test_decode_steps_are_computed_here():
    model = build(*MODELS["llama"], "iceformer")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for cache in (tf.DynamicCache(), tf.StaticCache(config=model.config, max_cache_len=32)):
            parts = [model(IDS[:, :20], past_key_values=cache).logits]
            parts += [model(IDS[:, [at]], past_key_values=cache).logits for at in range(20, 24)]
            assert hook.last_report().rows == 3 * 4
            assert (torch.cat(parts, dim=1) - model(IDS).logits).abs().max() < 0.3


def test_graphs_hold_the_operator():
    model = build(*MODELS["llama"], "iceformer")
    operators = []

    def backend(graph, _):
        operators.extend(str(node.target) for node in graph.graph.nodes)
        return graph.forward

    mask = torch.ones_like(IDS)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = torch.compile(model, backend=backend)(IDS, attention_mask=mask).logits
        wanted = model(IDS, attention_mask=mask).logits
    assert any("iceformer.attention" in name for name in operators)
    assert (found - wanted).abs().max() < 0.3
