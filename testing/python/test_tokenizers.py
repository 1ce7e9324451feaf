"""The golden token ids against the packages that define the formats."""

import json
from pathlib import Path

import pytest
from gguf import GGUFReader
from tokenizers import Tokenizer

GOLDEN = Path(__file__).parent.parent / "golden" / "tokenizers"
TEXTS = json.loads((GOLDEN / "texts.json").read_text())


def expected(name: str) -> dict[str, list]:
    return json.loads((GOLDEN / f"{name}.json").read_text())


@pytest.mark.parametrize(("file", "name", "special"), [("byte-level", "smollm", False), ("sentencepiece", "sentencepiece", True)])
def test_hugging_face(file: str, name: str, special: bool) -> None:
    tokenizer = Tokenizer.from_file(str(GOLDEN / f"{file}.tokenizer.json"))
    golden = expected(name)
    ids = [tokenizer.encode(text, add_special_tokens=special).ids for text in TEXTS]
    assert ids == golden["hugging_face"]
    assert [tokenizer.decode(line) for line in ids] == golden["decoded"]


@pytest.mark.parametrize("path", sorted(GOLDEN.glob("*.gguf")), ids=lambda path: path.stem)
def test_gguf(path: Path) -> None:
    reader = GGUFReader(path)
    tokens = reader.get_field("tokenizer.ggml.tokens").contents()
    embedding = next(tensor for tensor in reader.tensors if tensor.name == "token_embd.weight")
    assert len(tokens) == embedding.shape[1]
    largest = max(max(line, default=0) for line in expected(path.stem)["llama_cpp"])
    assert 256 < largest < len(tokens)
