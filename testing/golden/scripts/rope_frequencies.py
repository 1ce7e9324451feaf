"""Writes testing/golden/rope_frequencies.json: frequencies and attention factors as transformers computes them.

    python rope_frequencies.py OUTPUT_FILE
"""

import json
import sys
from pathlib import Path

from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

CASES = [
    dict(rope_type="linear", factor=4.0),
    dict(
        rope_type="llama3",
        factor=8.0,
        low_freq_factor=1.0,
        high_freq_factor=4.0,
        original_max_position_embeddings=8192,
        rope_theta=500000.0,
        head_dim=128,
    ),
    dict(
        rope_type="llama3",
        factor=32.0,
        low_freq_factor=1.0,
        high_freq_factor=4.0,
        original_max_position_embeddings=8192,
        rope_theta=500000.0,
    ),
    dict(rope_type="yarn", factor=4.0, original_max_position_embeddings=32768, rope_theta=1000000.0, head_dim=128),
    dict(rope_type="yarn", factor=16.0, original_max_position_embeddings=4096, truncate=False),
    dict(rope_type="yarn", factor=8.0, original_max_position_embeddings=1024, beta_fast=16.0, beta_slow=2.0),
    dict(rope_type="yarn", factor=40.0, original_max_position_embeddings=4096, mscale=1.0, mscale_all_dim=0.8),
    dict(rope_type="yarn", factor=4.0, original_max_position_embeddings=2048, attention_factor=1.5),
]


def main() -> None:
    cases = []
    for case in CASES:
        rope = {"rope_theta": 10000.0} | case
        head_dim = rope.pop("head_dim", 64)
        config = LlamaConfig(hidden_size=head_dim, num_attention_heads=1, rope_parameters=dict(rope))
        frequencies, factor = ROPE_INIT_FUNCTIONS[rope["rope_type"]](config)
        cases.append(
            {"head_dim": head_dim, **rope, "expected_factor": factor, "expected_frequencies": frequencies.tolist()}
        )
    Path(sys.argv[1]).write_text(json.dumps(cases, indent=1) + "\n")


if __name__ == "__main__":
    main()
