"""What `last_report` tells of calls that run inside compiled graphs, and which threads a block of settings reaches."""

import contextvars
import threading

import iceformer.transformers as hook
import pytest
import torch
from models import build, decoders, encoders


@pytest.mark.parametrize("gradients", [False, True], ids=["operator", "sdpa"])
@pytest.mark.parametrize("name", ["bert", "llama"])
@pytest.mark.filterwarnings("ignore:iceformer hands attention over")
def test_compiled_calls_have_no_report(name, gradients):
    torch._dynamo.reset()
    model = build(*(decoders() | encoders())[name], "iceformer")
    compiled = torch.compile(model, backend="eager")
    arguments = {
        "input_ids": torch.randint(3, 97, (2, 20), generator=torch.Generator().manual_seed(1)),
        "attention_mask": torch.ones(2, 20, dtype=torch.long),
    }
    # The first call compiles, the second one only runs.
    for _ in range(2):
        with torch.no_grad():
            model(**arguments)
        assert hook.last_report().rows == 2 * 4 * 20
        with torch.set_grad_enabled(gradients):
            compiled(**arguments)
        assert hook.last_report() is None
    torch._dynamo.reset()


def test_exported_programs_have_no_report():
    model = build(*encoders()["bert"], "iceformer")
    ids = torch.ones(2, 20, dtype=torch.long)
    arguments = {"input_ids": ids, "attention_mask": ids}
    with torch.no_grad():
        exported = torch.export.export(model, (), arguments, strict=False).module()
        model(**arguments)
        assert hook.last_report() is not None
        exported(**arguments)
    assert hook.last_report() is None


def test_blocks_go_with_their_context():
    seen = []

    def look():
        seen.append(hook.current_settings().kv_type)

    def started(target, *arguments):
        thread = threading.Thread(target=target, args=arguments)
        thread.start()
        thread.join()

    with hook.settings(kv_type="int8"):
        started(contextvars.copy_context().run, look)
    assert seen == ["int8"]
