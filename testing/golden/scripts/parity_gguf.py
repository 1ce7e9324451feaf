"""Writes the GGUF models of testing/golden/parity_gguf, quantised by llama.cpp, and what they should compute.

    python parity_gguf.py OUTPUT_FOLDER

Random weights of our own are written with the `gguf` package under the names, metadata and row order of llama.cpp's
converter, then quantised by llama.cpp itself. `NAME.expected.safetensors` holds `tokens`, `logits` (f32: transformers
in f32 with the weights that the `gguf` package dequantises from the file), `llama_cpp_logits` of the last position
(llama.cpp reading the same file) and `llama_cpp_divergence` (nats, of each position, against `logits`).
"""

import ctypes
import json
import math
import sys
import tempfile
from pathlib import Path

import gguf
import llama_cpp
import numpy as np
import torch
from parity_models import SMALL, TEXT, randomise, train_tokenizer
from safetensors.numpy import save_file
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM, Qwen3Config, Qwen3ForCausalLM

TOKENS = 96
# Every row a whole number of blocks; with the 112 of SMALL llama.cpp falls back to F16 for one matrix of a layer.
EVEN = SMALL | dict(intermediate_size=128)
# K-quants take rows of a multiple of 256.
WIDE = SMALL | dict(hidden_size=256, intermediate_size=256)
LLAMA3 = dict(
    rope_theta=500000.0,
    rope_type="llama3",
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=64,
)
LINEAR = dict(rope_theta=10000.0, rope_type="linear", factor=4.0)
YARN = dict(rope_theta=1000000.0, rope_type="yarn", factor=4.0, original_max_position_embeddings=64)

# name: (model class, configuration, type for llama.cpp's quantiser, the one type for all matrices)
MODELS = {
    "llama-f32": (LlamaForCausalLM, LlamaConfig(**SMALL), None, False),
    "llama-rope-llama3-f16": (LlamaForCausalLM, LlamaConfig(**SMALL, rope_parameters=LLAMA3), "MOSTLY_F16", False),
    "llama-rope-linear-bf16": (LlamaForCausalLM, LlamaConfig(**SMALL, rope_parameters=LINEAR), "MOSTLY_BF16", False),
    "llama-tied-q8_0": (LlamaForCausalLM, LlamaConfig(**EVEN, tie_word_embeddings=True), "MOSTLY_Q8_0", False),
    "qwen2-rope-yarn-q8_0": (Qwen2ForCausalLM, Qwen2Config(**SMALL, rope_parameters=YARN), "MOSTLY_Q8_0", False),
    "qwen3-q4_0": (Qwen3ForCausalLM, Qwen3Config(**EVEN, head_dim=32), "MOSTLY_Q4_0", True),
    "llama-tied-q4_k_m": (LlamaForCausalLM, LlamaConfig(**WIDE, tie_word_embeddings=True), "MOSTLY_Q4_K_M", False),
    "qwen2-tied-q5_k": (Qwen2ForCausalLM, Qwen2Config(**WIDE, tie_word_embeddings=True), "MOSTLY_Q5_K_S", True),
    "qwen3-tied-q6_k": (
        Qwen3ForCausalLM,
        Qwen3Config(**WIDE, head_dim=64, tie_word_embeddings=True),
        "MOSTLY_Q6_K",
        True,
    ),
    "llama-q4_1": (LlamaForCausalLM, LlamaConfig(**EVEN), "MOSTLY_Q4_1", True),
    # Rows that are no whole number of superblocks: llama.cpp takes Q5_0 for Q4_K, Q5_1 for Q5_K and Q8_0 for Q6_K.
    "qwen2-tied-q4_k_m-as-q5_0": (
        Qwen2ForCausalLM,
        Qwen2Config(**EVEN, tie_word_embeddings=True),
        "MOSTLY_Q4_K_M",
        False,
    ),
    "qwen3-q5_k_m-as-q5_1": (Qwen3ForCausalLM, Qwen3Config(**EVEN, head_dim=32), "MOSTLY_Q5_K_M", False),
    # Types that are computed as another.
    "qwen2-tied-q2_k": (Qwen2ForCausalLM, Qwen2Config(**WIDE, tie_word_embeddings=True), "MOSTLY_Q2_K", True),
    "llama-tied-q3_k": (LlamaForCausalLM, LlamaConfig(**WIDE, tie_word_embeddings=True), "MOSTLY_Q3_K_M", True),
    "qwen3-iq4_nl": (Qwen3ForCausalLM, Qwen3Config(**EVEN, head_dim=32), "MOSTLY_IQ4_NL", True),
    "llama-tied-iq4_xs": (LlamaForCausalLM, LlamaConfig(**WIDE, tie_word_embeddings=True), "MOSTLY_IQ4_XS", True),
}


def swap_halves(rows: np.ndarray, heads: int) -> np.ndarray:
    """llama.cpp's row order for `llama` query and key weights: the two halves of a head interleaved."""
    return rows.reshape(heads, 2, rows.shape[0] // heads // 2, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


def unswap_halves(rows: np.ndarray, heads: int) -> np.ndarray:
    return rows.reshape(heads, rows.shape[0] // heads // 2, 2, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


def swapped_heads(config, name: str) -> int | None:
    """Number of heads whose halves are interleaved in the file, for tensors where they are."""
    if config.model_type != "llama":
        return None
    return {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(name.split(".")[-2])


def llama3_factors(config) -> np.ndarray:
    rope = config.rope_parameters
    frequencies = rope["rope_theta"] ** -(np.arange(0, config.head_dim, 2) / config.head_dim)
    turns = rope["original_max_position_embeddings"] * frequencies / (2 * math.pi)
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    kept = np.clip((turns - low) / (high - low), 0, 1)
    return (1 / (kept + (1 - kept) / rope["factor"])).astype(np.float32)


def write(model, tokenizer, path: Path) -> None:
    config = model.config
    writer = gguf.GGUFWriter(path, config.model_type)
    writer.add_name("random weights")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    if config.model_type == "qwen3":
        writer.add_key_length(head_dim)
        writer.add_value_length(head_dim)
    if config.model_type == "llama":
        writer.add_rope_dimension_count(head_dim)
    rope = config.rope_parameters
    writer.add_rope_freq_base(rope["rope_theta"])
    if rope["rope_type"] == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope["factor"])
    elif rope["rope_type"] == "yarn":
        writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        writer.add_rope_scaling_factor(rope["factor"])
        writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
    elif rope["rope_type"] == "llama3":
        writer.add_tensor("rope_freqs.weight", llama3_factors(config))

    pieces = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
    special = set(tokenizer.all_special_ids)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2" if config.model_type.startswith("qwen") else "llama-bpe")
    writer.add_token_list([piece for piece, _ in pieces])
    writer.add_token_types([gguf.TokenType.CONTROL if i in special else gguf.TokenType.NORMAL for _, i in pieces])
    merges = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]
    writer.add_token_merges([merge if isinstance(merge, str) else " ".join(merge) for merge in merges])
    writer.add_bos_token_id(tokenizer.bos_token_id)
    writer.add_eos_token_id(tokenizer.eos_token_id)
    writer.add_add_bos_token(False)

    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[config.model_type.upper()], config.num_hidden_layers)
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        data = tensor.numpy()
        if heads := swapped_heads(config, name):
            data = swap_halves(data, heads)
        writer.add_tensor(names.get_name(name, try_suffixes=(".weight", ".bias")), np.ascontiguousarray(data))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def quantise(source: Path, target: Path, kind: str | None, pure: bool) -> None:
    if kind is None:
        target.write_bytes(source.read_bytes())
        return
    settings = llama_cpp.llama_model_quantize_default_params()
    settings.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_{kind}")
    settings.nthread = 1
    settings.pure = pure
    if llama_cpp.llama_model_quantize(str(source).encode(), str(target).encode(), ctypes.byref(settings)) != 0:
        raise SystemExit(f"{target}: llama.cpp does not quantise it")


def load_dequantised(model, path: Path) -> None:
    config = model.config
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[config.model_type.upper()], config.num_hidden_layers)
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    state = {}
    for name, old in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            name_in_file = "token_embd.weight"
        else:
            name_in_file = names.get_name(name, try_suffixes=(".weight", ".bias"))
        tensor = tensors[name_in_file]
        data = gguf.quants.dequantize(tensor.data, tensor.tensor_type).astype(np.float32).reshape(old.shape)
        if heads := swapped_heads(config, name):
            data = unswap_halves(data, heads)
        state[name] = torch.from_numpy(np.ascontiguousarray(data))
    model.load_state_dict(state)


def llama_cpp_logits(path: Path, tokens: list[int]) -> np.ndarray:
    model = llama_cpp.Llama(str(path), n_ctx=256, n_batch=256, n_threads=1, logits_all=True, verbose=False)
    model.eval(tokens)
    return model.scores[: len(tokens)].astype(np.float32)


def divergence(reference: np.ndarray, other: np.ndarray) -> np.ndarray:
    p, q = (torch.log_softmax(torch.from_numpy(x).double(), -1) for x in (reference, other))
    return (p.exp() * (p - q)).sum(-1).numpy()


def main() -> None:
    output = Path(sys.argv[1])
    output.mkdir(parents=True, exist_ok=True)
    tokenizer = train_tokenizer()
    tokens = tokenizer.encode(TEXT)[:TOKENS]
    for index, (name, (model_class, config, kind, pure)) in enumerate(MODELS.items()):
        config._attn_implementation = "eager"
        model = model_class(config).eval()
        randomise(model, 50000 + index)
        target = output / f"{name}.gguf"
        with tempfile.TemporaryDirectory() as folder:
            source = Path(folder) / "source.gguf"
            write(model, tokenizer, source)
            quantise(source, target, kind, pure)
        load_dequantised(model, target)
        with torch.no_grad():
            logits = model(torch.tensor([tokens])).logits[0].numpy()
        other = llama_cpp_logits(target, tokens)
        divergences = divergence(logits, other)
        save_file(
            {
                "tokens": np.array(tokens, dtype=np.int32),
                "logits": np.ascontiguousarray(logits),
                "llama_cpp_logits": np.ascontiguousarray(other[-1]),
                "llama_cpp_divergence": divergences.astype(np.float64),
            },
            output / f"{name}.expected.safetensors",
        )
        types = sorted({tensor.tensor_type.name for tensor in gguf.GGUFReader(target).tensors})
        print(
            f"{name}: {target.stat().st_size} bytes, {' '.join(types)}, logit deviation {logits.std():.2f}, "
            f"llama.cpp diverges by {divergences.mean():.1e} (largest {divergences.max():.1e}) nats"
        )


if __name__ == "__main__":
    main()
