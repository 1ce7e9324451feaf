#!/usr/bin/env bash
# Copies a trained reference model into models/reference.
#
#     recipes/reference_model.sh FOLDER
#
# FOLDER is the output of recipes/train_reference.py: config.json, tokenizer.json, model.safetensors and log.jsonl.
set -euo pipefail

if [ $# -ne 1 ]; then
    echo "usage: $0 FOLDER" >&2
    exit 2
fi
target=$(cd "$(dirname "$0")/.." && pwd)/models/reference
mkdir -p "$target"
for name in config.json tokenizer.json model.safetensors log.jsonl; do
    if [ ! -f "$1/$name" ]; then
        echo "error: $1/$name is missing; expected the output folder of recipes/train_reference.py" >&2
        exit 1
    fi
    install -m 644 "$1/$name" "$target/$name"
done
echo "copied to $target"
