"""The golden files against the packages that define their formats."""

from pathlib import Path

import numpy as np
import pytest
from gguf import GGUFReader
from safetensors.numpy import load_file
from tokenizers import Tokenizer

GOLDEN = Path(__file__).parent.parent / "golden"
TEXT = (GOLDEN / "scripts" / "parity_text.txt").read_text()
FOLDERS = sorted(path.parent for path in GOLDEN.glob("parity/*/config.json"))
GGUF_FILES = sorted(GOLDEN.glob("parity_gguf/*.gguf"))


def check_expected(expected: dict[str, np.ndarray], vocabulary: int) -> None:
    tokens, logits = expected["tokens"], expected["logits"]
    assert logits.shape == (len(tokens), vocabulary)
    assert logits.dtype == np.float32 and np.isfinite(logits).all()
    assert 0 <= tokens.min() and tokens.max() < vocabulary
    # A model whose logits are flat would hide errors.
    assert logits.std() > 0.8


def test_models_are_there() -> None:
    assert len(FOLDERS) >= 12
    assert len(GGUF_FILES) >= 9


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_folder(folder: Path) -> None:
    expected = load_file(folder / "expected.safetensors")
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokens = expected["tokens"].tolist()
    assert tokenizer.encode(TEXT).ids[: len(tokens)] == tokens
    check_expected(expected, tokenizer.get_vocab_size())
    # The continuation starts with the best logit of the last position.
    assert expected["continuation"][0] == expected["logits"][-1].argmax()


@pytest.mark.parametrize("path", GGUF_FILES, ids=lambda path: path.stem)
def test_gguf(path: Path) -> None:
    reader = GGUFReader(path)
    pieces = reader.get_field("tokenizer.ggml.tokens").contents()
    check_expected(load_file(path.with_suffix(".expected.safetensors")), len(pieces))
