"""What graphs of torch.compile and torch.export hold with gradients enabled and without."""

import warnings

import iceformer.transformers  # noqa: F401, registers the implementation
import pytest
import torch
from models import build, encoders


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
