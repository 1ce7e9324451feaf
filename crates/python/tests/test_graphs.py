"""What graphs of torch.compile and torch.export hold with gradients enabled and without."""

import warnings

import iceformer.transformers  # noqa: F401, registers the implementation
import pytest
import torch
from models import build, decoders, encoders


@pytest.mark.parametrize("gradients, held", [(False, "iceformer.attention"), (True, "scaled_dot_product")])
def test_gradients_decide_what_a_graph_holds(gradients, held):
    torch._dynamo.reset()
    model = build(*encoders()["bert"], "iceformer")
    ids = torch.ones(2, 20, dtype=torch.long)
    arguments = {"input_ids": ids, "attention_mask": ids}
    operators = []

    def backend(graph, _):
        operators.extend(str(node.target) for node in graph.graph.nodes)
        return graph.forward

    with torch.set_grad_enabled(gradients), warnings.catch_warnings():
        # Nothing is said of it while compiling.
        warnings.filterwarnings("error", message="iceformer hands attention over")
        exported = torch.export.export(model, (), arguments, strict=False)
        torch.compile(model, backend=backend)(**arguments)
    torch._dynamo.reset()
    for names in (operators, [str(node.target) for node in exported.graph.nodes]):
        found = {one for one in ("iceformer.attention", "scaled_dot_product") if any(one in name for name in names)}
        assert found == {held}


def test_soft_caps_with_int8_asked_for():
    torch._dynamo.reset()
    model = build(*decoders()["gemma2"], "iceformer")
    ids = torch.randint(3, 97, (2, 20), generator=torch.Generator().manual_seed(0))
    arguments = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    with torch.no_grad(), iceformer.transformers.settings(kv_type="int8"):
        wanted = model(**arguments).logits
        found = torch.compile(model, backend="aot_eager")(**arguments).logits
    torch._dynamo.reset()
    assert (found - wanted).abs().max() < 1e-4
