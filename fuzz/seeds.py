"""Writes the seeds of the fuzz targets: the smallest files that reach every part of the parsers.

Needs: pip install numpy gguf safetensors
"""

import json
import pathlib

import gguf
import numpy
from safetensors.numpy import save

CORPUS = pathlib.Path(__file__).parent / "corpus"
CONFIG = {
    "model_type": "llama", "hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
    "num_key_value_heads": 1, "vocab_size": 8, "rms_norm_eps": 1e-5, "max_position_embeddings": 64,
    "tie_word_embeddings": True, "eos_token_id": [1, 2],
}
TOKENS = ["<s>", "</s>", "a", "b", "ab", "Ġ", "Ċ", "<unk>"]


def put(target, name, data):
    folder = CORPUS / target
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_bytes(data if isinstance(data, bytes) else data.encode())


def tokenizer_fields(writer, kind):
    writer.add_tokenizer_model(kind)
    if kind == "gpt2":
        writer.add_tokenizer_pre("llama-bpe")
        writer.add_token_list(TOKENS)
        writer.add_token_merges(["a b"])
        writer.add_token_types([3, 3, 1, 1, 1, 1, 4, 2])
    else:
        tokens = [*TOKENS, *(f"<0x{byte:02X}>" for byte in range(256))]
        writer.add_token_list(tokens)
        writer.add_token_scores([-float(index) for index in range(len(tokens))])
        writer.add_token_types([3, 3, 1, 1, 1, 1, 4, 2] + [6] * 256)
        writer.add_add_space_prefix(True)
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    writer.add_add_bos_token(True)
    writer.add_chat_template("{% for m in messages %}{{ m.role }}: {{ m.content }}{{ eos_token }}{% endfor %}")


def write_gguf(target, name, architecture, tensors, kind="gpt2"):
    path = CORPUS / target / name
    path.parent.mkdir(parents=True, exist_ok=True)
    writer = gguf.GGUFWriter(path, architecture)
    if tensors:
        writer.add_context_length(64)
        writer.add_embedding_length(8)
        writer.add_block_count(1)
        writer.add_feed_forward_length(16)
        writer.add_head_count(2)
        writer.add_head_count_kv(1)
        writer.add_layer_norm_rms_eps(1e-5)
        writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        writer.add_rope_scaling_factor(2.0)
    tokenizer_fields(writer, kind)
    shapes = {
        "token_embd": (8, 8), "output_norm": (8,), "blk.0.attn_norm": (8,), "blk.0.ffn_norm": (8,),
        "blk.0.attn_q": (8, 8), "blk.0.attn_k": (4, 8), "blk.0.attn_v": (4, 8), "blk.0.attn_output": (8, 8),
        "blk.0.ffn_gate": (16, 8), "blk.0.ffn_up": (16, 8), "blk.0.ffn_down": (8, 16),
    }
    if architecture == "qwen3":
        shapes |= {"blk.0.attn_q_norm": (4,), "blk.0.attn_k_norm": (4,)}
    for tensor, shape in shapes.items() if tensors else ():
        kind = numpy.float16 if len(shape) > 1 else numpy.float32
        writer.add_tensor(f"{tensor}.weight", numpy.ones(shape, dtype=kind))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def write_quantised():
    """One layer whose matrices are of the types that are written anew as they are read, and of others."""
    path = CORPUS / "gguf" / "quantised.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(64)
    writer.add_embedding_length(256)
    writer.add_block_count(1)
    writer.add_feed_forward_length(32)
    writer.add_head_count(1)
    writer.add_head_count_kv(1)
    writer.add_key_length(16)
    writer.add_value_length(16)
    writer.add_layer_norm_rms_eps(1e-5)
    tokenizer_fields(writer, "gpt2")
    for tensor in ["output_norm", "blk.0.attn_norm", "blk.0.ffn_norm"]:
        writer.add_tensor(f"{tensor}.weight", numpy.ones(256, dtype=numpy.float32))
    for tensor, rows, columns, kind in [
        ("token_embd", 8, 256, "Q2_K"),
        ("blk.0.attn_q", 16, 256, "Q3_K"),
        ("blk.0.attn_k", 16, 256, "IQ4_XS"),
        ("blk.0.attn_v", 16, 256, "IQ4_NL"),
        ("blk.0.attn_output", 256, 16, "F16"),
        ("blk.0.ffn_gate", 32, 256, "Q4_K"),
        ("blk.0.ffn_up", 32, 256, "Q6_K"),
        ("blk.0.ffn_down", 256, 32, "Q5_1"),
    ]:
        kind = gguf.GGMLQuantizationType[kind]
        weights, size = gguf.GGML_QUANT_SIZES[kind]
        bytes_of_rows = numpy.full((rows, columns // weights * size), 0x2A, dtype=numpy.uint8)
        writer.add_tensor(f"{tensor}.weight", bytes_of_rows, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def main():
    write_quantised()
    write_gguf("gguf", "llama.gguf", "llama", True)
    write_gguf("gguf", "qwen3.gguf", "qwen3", True)
    write_gguf("tokenizer_metadata", "gpt2.gguf", "llama", False)
    write_gguf("tokenizer_metadata", "llama.gguf", "llama", False, "llama")

    put("config", "llama.json", json.dumps(CONFIG))
    scaling = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32, "mscale": 1.0}
    put("config", "yarn.json", json.dumps(CONFIG | {"model_type": "qwen2", "rope_scaling": scaling}))
    scaling = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    put("config", "llama3.json", json.dumps(CONFIG | {"rope_parameters": scaling, "attention_bias": True}))
    layers = {"use_sliding_window": True, "sliding_window": 16, "layer_types": ["sliding_attention"]}
    put("config", "window.json", json.dumps(CONFIG | {"model_type": "qwen3", "head_dim": 4} | layers))

    index = {"metadata": {}, "weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}
    put("safetensors_index", "index", b"\0" + json.dumps(index).encode())
    tensors = {"a": numpy.ones((2, 3), dtype=numpy.float32), "b": numpy.ones(4, dtype=numpy.float16)}
    put("safetensors_index", "file", b"\1" + save(tensors, {"format": "pt"}))

    for kind in sorted((CORPUS.parent.parent / "testing/golden/tokenizers").glob("*.tokenizer.json")):
        put("tokenizer_json", kind.name, kind.read_text())

    chats = json.loads((CORPUS.parent.parent / "testing/golden/chat.json").read_text())
    for name, template in chats["templates"].items():
        put("chat_template", name.replace(" ", "-"), template)


if __name__ == "__main__":
    main()
