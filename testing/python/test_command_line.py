"""What the command line says of the golden models against the packages that define their formats."""

import json
import os
import subprocess
from pathlib import Path

import pytest
from gguf import GGUFReader
from safetensors import safe_open
from safetensors.numpy import load_file
from tokenizers import Tokenizer

GOLDEN = Path(__file__).parent.parent / "golden"
FOLDERS = sorted(path.parent for path in GOLDEN.glob("parity/*/config.json"))
GGUF_FILES = sorted(GOLDEN.glob("parity_gguf/*.gguf"))
ICEFORMER = os.environ["ICEFORMER"]


def iceformer(*arguments: str | Path) -> dict:
    command = [ICEFORMER, *map(str, arguments)]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("path", GGUF_FILES, ids=lambda path: path.stem)
def test_inspect_gguf(path: Path) -> None:
    found = iceformer("inspect", path, "--json", "--tensors")
    reader = GGUFReader(path)
    expected = {
        tensor.name: (tensor.tensor_type.name.lower(), [int(size) for size in reversed(tensor.shape)], tensor.n_bytes)
        for tensor in reader.tensors
    }
    tensors = {tensor["name"]: (tensor["type"], tensor["shape"], tensor["bytes"]) for tensor in found["tensors"]}
    assert tensors == expected
    family = reader.get_field("general.architecture").contents()
    assert found["family"] == family
    assert found["config"]["layers"] == reader.get_field(f"{family}.block_count").contents()
    assert found["config"]["kv_heads"] == reader.get_field(f"{family}.attention.head_count_kv").contents()
    assert found["context_length"] == reader.get_field(f"{family}.context_length").contents()


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_inspect_folder(folder: Path) -> None:
    found = iceformer("inspect", folder, "--json", "--tensors")
    expected = {}
    for file in folder.glob("model*.safetensors"):
        with safe_open(file, "numpy") as tensors:
            expected |= {name: tensors.get_slice(name).get_shape() for name in tensors.keys()}
    assert {tensor["name"]: tensor["shape"] for tensor in found["tensors"]} == expected
    config = json.loads((folder / "config.json").read_text())
    assert found["family"] == config["model_type"]
    assert found["config"]["hidden_size"] == config["hidden_size"]
    assert found["config"]["tied_embeddings"] == config["tie_word_embeddings"]


def test_run_continues_as_transformers_does() -> None:
    # The one model stored in f32, so that nothing is rounded.
    folder = GOLDEN / "parity" / "llama-sharded"
    expected = load_file(folder / "expected.safetensors")
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokens, continuation = expected["tokens"].tolist(), expected["continuation"].tolist()
    text = tokenizer.decode(tokens, skip_special_tokens=False)
    assert tokenizer.encode(text).ids == tokens
    settings = ["--kv-type", "f32", "--max-tokens", str(len(continuation)), "--json"]
    found = iceformer("run", "--model", folder, "--no-chat", "--prompt", text, *settings)
    assert found["text"] == tokenizer.decode(continuation, skip_special_tokens=False)
