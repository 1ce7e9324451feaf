"""Writes the tiny random models of testing/golden/parity and what transformers computes with them.

    python parity_models.py OUTPUT_FOLDER

Each model is a folder as `save_pretrained` writes it, with our own tokenizer and weights drawn from a seed, and
`expected.safetensors`: `tokens` (the text encoded by the tokenizer), `logits` (f32, of every position, computed by
transformers in f32 from the stored weights) and `continuation` (what greedy decoding adds to the text).
"""

import json
import shutil
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

VOCABULARY = 320
TOKENS = 150
CONTINUATION = 24
# The least gap between the two best logits in a greedy continuation, so that rounding cannot change it.
MARGIN = 2e-3
TEXT = (Path(__file__).parent / "parity_text.txt").read_text()
SPLIT = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def train_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer in the manner of Llama 3, trained on the text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<|begin|>", "<|end|>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator([TEXT], trainer)
    assert tokenizer.get_vocab_size() == VOCABULARY
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<|begin|>", eos_token="<|end|>")


SMALL = dict(
    vocab_size=VOCABULARY,
    hidden_size=64,
    intermediate_size=112,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=256,
    bos_token_id=0,
    eos_token_id=1,
)

LLAMA3 = dict(
    rope_type="llama3",
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=64,
)
YARN = dict(rope_type="yarn", factor=4.0, original_max_position_embeddings=64)

# name: (model class, configuration, stored type, largest shard)
MODELS = {
    "llama-sharded": (LlamaForCausalLM, LlamaConfig(**SMALL, tie_word_embeddings=False), torch.float32, "120KB"),
    "llama-rope-llama3-tied": (
        LlamaForCausalLM,
        LlamaConfig(**SMALL, tie_word_embeddings=True, rope_parameters=dict(rope_theta=500000.0, **LLAMA3)),
        torch.bfloat16,
        "5GB",
    ),
    "llama-rope-linear": (
        LlamaForCausalLM,
        LlamaConfig(**SMALL, rope_parameters=dict(rope_theta=10000.0, rope_type="linear", factor=4.0)),
        torch.float16,
        "5GB",
    ),
    "llama-rope-yarn-tied": (
        LlamaForCausalLM,
        LlamaConfig(**SMALL, tie_word_embeddings=True, rope_parameters=dict(rope_theta=10000.0, **YARN)),
        torch.bfloat16,
        "5GB",
    ),
    "llama-biases": (
        LlamaForCausalLM,
        LlamaConfig(**SMALL, attention_bias=True, mlp_bias=True, rms_norm_eps=1e-5),
        torch.bfloat16,
        "5GB",
    ),
    # Head width 20 is no multiple of a vector, three query heads share one key/value head.
    "llama-odd-widths": (
        LlamaForCausalLM,
        LlamaConfig(**SMALL | dict(hidden_size=60, num_attention_heads=3, num_key_value_heads=1, num_hidden_layers=3)),
        torch.bfloat16,
        "5GB",
    ),
    "mistral-window": (
        MistralForCausalLM,
        MistralConfig(**SMALL, sliding_window=24, head_dim=32),
        torch.bfloat16,
        "5GB",
    ),
    "mistral-full-tied": (
        MistralForCausalLM,
        MistralConfig(**SMALL, sliding_window=None, tie_word_embeddings=True),
        torch.float16,
        "5GB",
    ),
    "qwen2-tied": (Qwen2ForCausalLM, Qwen2Config(**SMALL, tie_word_embeddings=True), torch.bfloat16, "5GB"),
    # The window holds from layer 1 on.
    "qwen2-window-yarn": (
        Qwen2ForCausalLM,
        Qwen2Config(
            **SMALL,
            use_sliding_window=True,
            sliding_window=24,
            max_window_layers=1,
            # With these every limit of the blend falls on a feature of its own.
            rope_parameters=YARN
            | dict(rope_theta=100.0, attention_factor=1.25, beta_fast=16.0, beta_slow=2.0)
            | dict(original_max_position_embeddings=256),
        ),
        torch.bfloat16,
        "5GB",
    ),
    "qwen3-tied": (
        Qwen3ForCausalLM,
        Qwen3Config(**SMALL, head_dim=32, tie_word_embeddings=True),
        torch.bfloat16,
        "5GB",
    ),
    "qwen3-rope-linear": (
        Qwen3ForCausalLM,
        Qwen3Config(**SMALL, head_dim=24, rope_parameters=dict(rope_theta=10000.0, rope_type="linear", factor=2.0)),
        torch.bfloat16,
        "5GB",
    ),
}

# Written with `rope_theta` and `rope_scaling` at the top level, as transformers did before version 5.
OLD_ROPE_FIELDS = {"llama-rope-llama3-tied", "llama-rope-yarn-tied", "qwen3-rope-linear"}


# Of the logits. The divergence that a rounding causes grows with its square.
LOGIT_DEVIATION = 1.0


def randomise(model: torch.nn.Module, seed: int) -> None:
    """Weights that make every part matter: attention is uneven, and logits differ."""
    generator = torch.Generator().manual_seed(seed)

    def normal(tensor: torch.Tensor, mean: float, deviation: float) -> None:
        tensor.copy_(mean + deviation * torch.randn(tensor.shape, generator=generator))

    tied = model.config.tie_word_embeddings
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            if name.endswith("embed_tokens.weight"):
                normal(tensor, 0.0, LOGIT_DEVIATION / tensor.shape[1] ** 0.5 if tied else 0.5)
            elif name.endswith("lm_head.weight"):
                normal(tensor, 0.0, LOGIT_DEVIATION / tensor.shape[1] ** 0.5)
            elif name.endswith("norm.weight"):
                normal(tensor, 1.0, 0.2)
            elif name.endswith("bias"):
                normal(tensor, 0.0, 0.3)
            elif name.endswith(("q_proj.weight", "k_proj.weight")):
                normal(tensor, 0.0, 1.3 / tensor.shape[1] ** 0.5)
            else:
                normal(tensor, 0.0, 1.0 / tensor.shape[1] ** 0.5)


@torch.no_grad()
def expect(model: torch.nn.Module, tokens: list[int]) -> tuple[torch.Tensor, list[int], float]:
    """Logits of every position, greedy continuation, and the least gap between its two best logits."""
    logits = model(torch.tensor([tokens])).logits[0]
    continuation, margin, row = [], float("inf"), logits[-1]
    for _ in range(CONTINUATION):
        best = row.topk(2).values
        margin = min(margin, float(best[0] - best[1]))
        continuation.append(int(row.argmax()))
        row = model(torch.tensor([tokens + continuation])).logits[0, -1]
    return logits, continuation, margin


def use_old_rope_fields(path: Path) -> None:
    config = json.loads(path.read_text())
    rope = config.pop("rope_parameters")
    config["rope_theta"] = rope.pop("rope_theta")
    # The oldest files say `type`.
    config["rope_scaling"] = {("type" if k == "rope_type" and rope[k] == "linear" else k): v for k, v in rope.items()}
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def main() -> None:
    output = Path(sys.argv[1])
    tokenizer = train_tokenizer()
    tokens = tokenizer.encode(TEXT)[:TOKENS]
    assert len(tokens) == TOKENS
    for index, (name, (model_class, config, stored, shard)) in enumerate(MODELS.items()):
        folder = output / name
        shutil.rmtree(folder, ignore_errors=True)
        for seed in range(1000 * index, 1000 * index + 100):
            model = model_class(config).eval()
            randomise(model, seed)
            model.to(stored)
            model.save_pretrained(folder, max_shard_size=shard)
            # Read back, not converted: conversion would leave the rotary frequencies rounded.
            model = model_class.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
            logits, continuation, margin = expect(model, tokens)
            if margin > MARGIN:
                break
        else:
            raise SystemExit(f"{name}: no seed gives a clear continuation")
        tokenizer.save_pretrained(folder)
        if name in OLD_ROPE_FIELDS:
            use_old_rope_fields(folder / "config.json")
        save_file(
            {
                "tokens": torch.tensor(tokens, dtype=torch.int32),
                "logits": logits.contiguous(),
                "continuation": torch.tensor(continuation, dtype=torch.int32),
            },
            folder / "expected.safetensors",
        )
        size = sum(file.stat().st_size for file in folder.iterdir())
        print(f"{name}: seed {seed}, {size} bytes, logit deviation {float(logits.std()):.2f}, margin {margin:.4f}")


if __name__ == "__main__":
    main()
