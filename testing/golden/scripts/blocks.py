"""Writes testing/golden/blocks: random blocks of each GGML type and what the `gguf` package dequantises them to.

    python testing/golden/scripts/blocks.py

For each type, `TYPE.bytes` holds blocks in the file format and `TYPE.f32` the numbers, little-endian.
"""

from pathlib import Path

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize

OUTPUT = Path(__file__).resolve().parent.parent / "blocks"
WEIGHTS = 2048
# Where each type keeps its f16 factors, as offsets in a block.
FACTORS = {
    "Q8_0": [0],
    "Q4_0": [0],
    "Q4_K": [0, 2],
    "Q5_K": [0, 2],
    "Q6_K": [208],
    "Q4_1": [0, 2],
    "Q5_0": [0],
    "Q5_1": [0, 2],
    "Q2_K": [80, 82],
    "Q3_K": [108],
    "IQ4_NL": [0],
    "IQ4_XS": [0],
}


def main() -> None:
    generator = np.random.default_rng(20)
    OUTPUT.mkdir(exist_ok=True)
    for name, factors in FACTORS.items():
        kind = GGMLQuantizationType[name]
        weights, size = GGML_QUANT_SIZES[kind]
        blocks = generator.integers(0, 256, (WEIGHTS // weights, size), dtype=np.uint8)
        for offset in factors:
            values = generator.normal(size=len(blocks)).astype("<f2")
            blocks[:, offset : offset + 2] = values.view(np.uint8).reshape(-1, 2)
        numbers = dequantize(blocks, kind).astype("<f4")
        (OUTPUT / f"{name.lower()}.bytes").write_bytes(blocks.tobytes())
        (OUTPUT / f"{name.lower()}.f32").write_bytes(numbers.tobytes())


if __name__ == "__main__":
    main()
