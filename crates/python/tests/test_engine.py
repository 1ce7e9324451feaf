"""`iceformer.Engine` on the reference model and the golden models."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import iceformer
import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[3]
REFERENCE = ROOT / "models" / "reference"
CHAT = ROOT / "testing" / "golden" / "parity" / "qwen3-tied"


@pytest.fixture(scope="module")
def engine():
    layers = []
    loaded = iceformer.Engine(REFERENCE, threads=2, progress=lambda done, total: layers.append((done, total)))
    assert layers and layers[-1][0] == layers[-1][1]
    return loaded


def test_generates_and_streams_the_same(engine):
    answer = engine.generate("Once upon a time", max_tokens=12)
    assert answer.finish in ("length", "end") and answer.prompt_tokens == len(engine.encode("Once upon a time"))
    with engine.generate("Once upon a time", stream=True, max_tokens=12) as stream:
        text = "".join(stream)
    assert text == answer.text == stream.answer.text
    assert stream.answer.tokens == answer.tokens and len(answer.tokens) <= 12
    # The prompt of the second call was held from the first, but for the token that is always read.
    assert stream.answer.kept_tokens == answer.prompt_tokens - 1


def test_seeds_and_threads(engine):
    settings = {"max_tokens": 12, "temperature": 1.0, "ignore_end": True}
    one = engine.generate("It was", seed=3, **settings)
    assert engine.generate("It was", seed=3, **settings).text == one.text
    assert engine.generate("It was", seed=4, **settings).text != one.text
    assert iceformer.Engine(REFERENCE, threads=1).generate("It was", seed=3, **settings).text == one.text


def test_prompts_of_every_kind(engine):
    tokens = engine.encode("Once upon a time")
    assert engine.generate(tokens, max_tokens=4).text == engine.generate("Once upon a time", max_tokens=4).text
    assert engine.generate(np.array(tokens), max_tokens=4).text == engine.generate(tokens, max_tokens=4).text
    assert "Once upon a time" in engine.decode(tokens)
    seen = []
    engine.generate("A long text. " * 100, max_tokens=1, progress=lambda done, total: seen.append((done, total)))
    assert seen and seen[-1][0] == seen[-1][1]


def test_a_stream_stops_early(engine):
    with engine.generate("Once upon a time", stream=True, ignore_end=True, max_tokens=None) as stream:
        next(stream)
    assert stream.answer.finish == "cancelled"
    assert engine.generate("Once upon a time", max_tokens=2).tokens
    dropped = engine.generate("Once upon a time", stream=True, ignore_end=True, max_tokens=None)
    next(dropped)
    del dropped
    assert engine.generate("Once upon a time", max_tokens=2).tokens


def test_a_stream_stops_no_other(engine):
    first = engine.generate("Once upon a time", stream=True, max_tokens=2)
    # It goes on by itself; when it has ended the next takes over its session.
    time.sleep(1)
    second = engine.generate("The little dog", stream=True, max_tokens=40, ignore_end=True)
    next(second)
    first.close()
    for _ in second:
        pass
    assert second.answer.finish == "length" and len(second.answer.tokens) == 40


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_an_engine_answers_in_a_process_forked_while_it_works(engine):
    wanted = engine.generate("The little dog", max_tokens=5).tokens
    with engine.generate("Once upon a time " * 60, stream=True, max_tokens=200, ignore_end=True) as busy:
        next(busy)
        child = os.fork()
        if child == 0:
            os._exit(int(engine.generate("The little dog", max_tokens=5).tokens != wanted))
        for _ in range(400):
            ended, status = os.waitpid(child, os.WNOHANG)
            if ended:
                break
            time.sleep(0.05)
        else:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            pytest.fail("the forked process hangs")
    assert status == 0


@pytest.mark.skipif(not (CHAT / "tokenizer_config.json").exists(), reason="no golden chat model")
def test_messages_need_a_template():
    engine = iceformer.Engine(CHAT, threads=1)
    if engine.has_chat_template:
        assert engine.generate([{"role": "user", "content": "Hello"}], max_tokens=2).prompt_tokens > 1
    else:
        with pytest.raises(ValueError, match="no chat template"):
            engine.generate([{"role": "user", "content": "Hello"}])


def chat_engine(folder, template):
    """The golden chat model with another template."""
    for file in CHAT.iterdir():
        if file.name not in ("chat_template.jinja", "tokenizer_config.json"):
            (folder / file.name).write_bytes(file.read_bytes())
    (folder / "chat_template.jinja").write_text(template)
    return iceformer.Engine(folder, threads=1)


@pytest.mark.skipif(not CHAT.exists(), reason="no golden chat model")
def test_the_template_sees_every_key_and_variable(tmp_path):
    engine = chat_engine(tmp_path, "{{ messages | tojson }}{{ enable_thinking | tojson }}{{ tools | tojson }}")
    call = {"name": "weather", "arguments": {"unit": "C", "city": "Paris"}}
    messages = [
        {"role": "user", "content": "Weather?"},
        {"role": "assistant", "tool_calls": [call]},
        {"role": "assistant", "content": None, "reasoning_content": "Hm"},
    ]
    tokens, chat = engine._encode(messages, {"enable_thinking": False, "tools": [call]})
    assert chat and engine.decode(tokens) == json.dumps(messages) + "false" + json.dumps([call])
    answer = engine.generate(messages, tools=[call], template_variables={"enable_thinking": False}, max_tokens=1)
    assert answer.prompt_tokens == len(tokens)
    with pytest.raises(ValueError, match="are for messages"):
        engine.generate("text", tools=[call])
    with pytest.raises(ValueError, match="variable messages is set already"):
        engine.generate(messages, template_variables={"messages": []})
    with pytest.raises(TypeError, match="the messages hold what JSON cannot: .*bytes"):
        engine.generate([{"role": "user", "content": "a", "picture": b"x"}])
    with pytest.raises(TypeError, match="the content of message 0 is a NoneType; expected a text"):
        engine.generate([{"role": "user", "content": None}])


def test_what_does_not_fit_is_named(engine, tmp_path):
    with pytest.raises(ValueError, match="config.json"):
        iceformer.Engine(tmp_path)
    with pytest.raises(ValueError, match="a/model: No such file .* a model folder or a .gguf file"):
        iceformer.Engine("a/model")
    with pytest.raises(ValueError, match="context of 10000000 tokens"):
        iceformer.Engine(REFERENCE, context=10_000_000)
    with pytest.raises(ValueError, match='kv_type is "q4"'):
        iceformer.Engine(REFERENCE, kv_type="q4")
    for method in ("exact", "dci"):
        with pytest.raises(ValueError, match=f"budget is 0.1 and method '{method}', which has none"):
            iceformer.Engine(REFERENCE, method=method, budget=0.1)
    with pytest.raises(ValueError, match="no tokens"):
        engine.generate([])
    with pytest.raises(ValueError, match="the context takes"):
        iceformer.Engine(REFERENCE, context=8).generate("one two three four five six seven eight nine ten")
    with pytest.raises(ValueError, match="temperature is -1"):
        engine.generate("a", temperature=-1.0)
    for settings in ({"max_tokens": -1}, {"top_k": -1}, {"seed": -1}, {"seed": 2**64}):
        with pytest.raises(ValueError, match=f"{next(iter(settings))} is .*; expected"):
            engine.generate("a", **settings)
    for setting in ("top_p", "min_p", "repetition_penalty"):
        with pytest.raises(ValueError, match=f"{setting} is -1; expected a number"):
            engine.generate("a", **{setting: -1.0})
    with pytest.raises(TypeError, match="max_tokens is a float; expected a whole number"):
        engine.generate("a", max_tokens=1.5)
    with pytest.raises(TypeError, match="temperature is '1'; expected a number"):
        engine.generate("a", temperature="1")
    with pytest.raises(TypeError, match='kv_type is None; expected "auto"'):
        iceformer.Engine(REFERENCE, kv_type=None)
    with pytest.raises(ValueError, match="context is -1; expected 0 or more"):
        iceformer.Engine(REFERENCE, context=-1)
    with pytest.raises(ValueError, match="token 1 is -1; expected 0 or more"):
        engine.generate([1, -1])
    with pytest.raises(TypeError, match="the content of message 0 is a list; expected a text"):
        engine.generate([{"role": "user", "content": [{"type": "text", "text": "a"}]}])
    with pytest.raises(TypeError, match="neither tokens nor messages"):
        engine.generate([1.5])
    with pytest.raises(TypeError, match="the prompt is a bytes; decode it to a text first"):
        engine.generate(b"x")
    with pytest.raises(TypeError, match="a single message; expected a list"):
        engine.generate({"role": "user", "content": "a"})
    with pytest.raises(TypeError, match="neither tokens nor messages"):
        engine.generate([5, {"role": "user", "content": "a"}])
    with pytest.raises(ValueError, match=r"message 0 has the keys \['text'\]"):
        engine.generate([{"text": "a"}])


def test_tokens_of_every_kind(engine):
    tokens = engine.encode("Once upon a time")
    wanted = engine.generate(tokens, max_tokens=4).text
    kinds = [np.array(tokens), tuple(tokens), list(np.array(tokens)), list(np.array(tokens, dtype=np.uint16))]
    torch = pytest.importorskip("torch")
    for kind in [*kinds, torch.tensor(tokens), list(torch.tensor(tokens))]:
        assert engine.generate(kind, max_tokens=4).text == wanted
        assert engine.decode(kind) == engine.decode(tokens)


def test_what_are_no_tokens(engine):
    torch = pytest.importorskip("torch")
    flags = np.array([5, 1]) == 1
    for read in (engine.decode, engine.generate):
        for given in ([True], flags, list(flags), torch.tensor([False]), list(torch.tensor([False]))):
            with pytest.raises(TypeError, match=r"token 0 is .*(True|False)\)?; expected a whole number"):
                read(given)
        for given in (np.array([[1, 2]]), torch.tensor([[1, 2]])):
            with pytest.raises(ValueError, match=r"has 2 dimensions, \(1, 2\); expected one, \[tokens\]"):
                read(given)
        for given in ([[1, 2], [3]], [np.array([1, 2])]):
            with pytest.raises(TypeError, match=f"is a list of {len(given)} sequences; expected one of tokens"):
                read(given)


def test_tokens_that_are_none_have_no_text(engine):
    with pytest.raises(ValueError, match="token 0 is -1; expected 0 or more"):
        engine.decode([-1])
    with pytest.raises(TypeError, match="token 1 is a float; expected a whole number"):
        engine.decode([1, 1.0])
    with pytest.raises(TypeError, match="tokens is 5; expected a list of tokens"):
        engine.decode(5)
    assert engine.decode([]) == "" and isinstance(engine.decode([4095]), str)
    # The same that `generate` says.
    for read in (engine.decode, engine.generate):
        with pytest.raises(ValueError, match="token 4096 is not below the model's vocabulary of 4096"):
            read([4096])


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"prompt": None}, "prompt is None; expected a text, tokens or messages"),
        ({"prompt": 5}, "prompt is 5; expected a text, tokens or messages"),
        ({"stop": None}, "stop is None; expected a text or a list of texts"),
        ({"stop": ["a", 5]}, "stop holds 5; expected a text or a list of texts"),
        ({"ignore_end": "no"}, "ignore_end is a str; expected True or False"),
        ({"tools": 5}, "tools is 5; expected a list of descriptions"),
        ({"template_variables": ["x"]}, "template_variables is a list; expected a dictionary"),
        ({"progress": 5}, "progress is a int; expected a function"),
    ],
)
def test_settings_of_other_types_are_named(engine, settings, message):
    with pytest.raises(TypeError, match=message):
        engine.generate(**{"prompt": "Once", "max_tokens": 1, **settings})


def test_models_of_other_types_are_named():
    with pytest.raises(TypeError, match="model is a NoneType; expected the path of a model folder"):
        iceformer.Engine(None)


@pytest.mark.parametrize(("value", "error"), [("mmx", "ICEFORMER_ISA is \"mmx\"; expected one of portable"), ("", None)])
def test_instruction_sets_that_are_none(value, error):
    environment = {**os.environ, "ICEFORMER_ISA": value}
    code = "import iceformer, numpy; x = numpy.ones((1, 1, 4, 8), numpy.float32); iceformer.attention(x, x, x)"
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert (done.returncode == 0) == (error is None), done.stderr
    if error is not None:
        assert f"ValueError: {error}" in done.stderr
