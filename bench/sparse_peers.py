"""Times sparse prompts: IceFormer beside the dense and the sparse modes of OpenVINO GenAI, with what each gets right.

    cargo build --release
    python3 bench/sparse_peers.py --data lines_680.jsonl --cases 5

The model is the reference model, the prompts are LongEval's. OpenVINO reads the model from a GGUF file that is written
beside the virtual environment. Contestants take turns, case by case; a process is started for every case, of IceFormer's methods
one for both, so that CPU seconds are those of one prompt. The table holds medians, and of how many cases the answer was right.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

import peers

PACKAGES = ["openvino-genai", "gguf", "numpy", "tokenizers"]
REFERENCE = peers.REPOSITORY / "models/reference"
QUESTION = "\nNow the record is over."
ANSWER_TOKENS = 8
# name: settings of OpenVINO's scheduler; None: IceFormer's method of that name.
CONTESTANTS = {
    "iceformer exact": None,
    "iceformer budgeted": None,
    "openvino": {},
    "openvino XATTENTION": {"mode": "XATTENTION"},
    "openvino TRISHAPE": {"mode": "TRISHAPE"},
}


def main() -> None:
    arguments = parse()
    if arguments.worker:
        print("\n" + json.dumps(run_openvino(json.loads(arguments.worker))), flush=True)
        os._exit(0)
    peers.PACKAGES = PACKAGES
    python = peers.make_environment(arguments.environment)
    if Path(sys.prefix) != arguments.environment:
        os.execv(python, [str(python), __file__, *sys.argv[1:]])
    compare(arguments)


def parse() -> argparse.Namespace:
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "iceformer"
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="LongEval's cases, one JSON object a line")
    parser.add_argument("--cases", type=int, default=5, help="cases of the file [%(default)s]")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="threads of each contestant [%(default)s]")
    parser.add_argument("--environment", type=Path, default=cache / "sparse-peers", help="environment [%(default)s]")
    parser.add_argument("--iceformer", type=Path, default=peers.REPOSITORY / "target/release/iceformer")
    parser.add_argument("--json", type=Path, help="also writes every run to this file, one JSON object a line")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if not arguments.worker and (arguments.data is None or arguments.cases < 1):
        parser.error("--data FILE is needed, and --cases of at least 1")
    arguments.environment = arguments.environment.resolve()
    return arguments


def tensors(path: Path) -> dict:
    """The bf16 tensors of a safetensors file as f32."""
    import numpy as np

    data = path.read_bytes()
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    header.pop("__metadata__", None)
    found = {}
    for name, entry in header.items():
        if entry["dtype"] != "BF16":
            raise SystemExit(f"error: {path}: {name} is {entry['dtype']}; expected BF16")
        start, end = (8 + size + offset for offset in entry["data_offsets"])
        bits = np.frombuffer(data[start:end], np.uint16).astype(np.uint32) << 16
        found[name] = bits.view(np.float32).reshape(entry["shape"])
    return found


def write_reference(path: Path) -> None:
    """Writes the reference model as GGUF, in the manner of llama.cpp's converter."""
    import gguf
    import numpy as np

    config = json.loads((REFERENCE / "config.json").read_text())
    weights = tensors(REFERENCE / "model.safetensors")
    tokenizer = json.loads((REFERENCE / "tokenizer.json").read_text())
    added, tokenizer = tokenizer["added_tokens"], tokenizer["model"]
    heads, kv_heads, head_dim = (config[name] for name in ("num_attention_heads", "num_key_value_heads", "head_dim"))
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("IceFormer reference model")
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_F16)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_rope_dimension_count(head_dim)
    writer.add_rope_freq_base(config["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])
    pieces = sorted(tokenizer["vocab"], key=tokenizer["vocab"].get)
    pieces += [f"<unused {index}>" for index in range(len(pieces), config["vocab_size"])]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("llama-bpe")
    writer.add_token_list(pieces)
    types = [gguf.TokenType.NORMAL] * len(pieces)
    for token in added:
        # Without any OpenVINO's tokenizer does not compile.
        types[token["id"]] = gguf.TokenType.CONTROL
    writer.add_token_types(types)
    writer.add_token_merges([merge if isinstance(merge, str) else " ".join(merge) for merge in tokenizer["merges"]])
    writer.add_bos_token_id(config["bos_token_id"])
    writer.add_eos_token_id(config["eos_token_id"])

    def interleaved(matrix: np.ndarray, count: int) -> np.ndarray:
        """Rows of a head as llama.cpp rotates them: channels of a pair beside one another."""
        return matrix.reshape(count, 2, head_dim // 2, -1).swapaxes(1, 2).reshape(matrix.shape)

    def add(name: str, matrix: np.ndarray) -> None:
        writer.add_tensor(name, matrix.astype(np.float32 if matrix.ndim == 1 else np.float16))

    add("token_embd.weight", weights["model.embed_tokens.weight"])
    add("output_norm.weight", weights["model.norm.weight"])
    add("output.weight", weights["model.embed_tokens.weight"])
    for layer in range(config["num_hidden_layers"]):
        block, source = f"blk.{layer}", f"model.layers.{layer}"
        add(f"{block}.attn_norm.weight", weights[f"{source}.input_layernorm.weight"])
        add(f"{block}.attn_q.weight", interleaved(weights[f"{source}.self_attn.q_proj.weight"], heads))
        add(f"{block}.attn_k.weight", interleaved(weights[f"{source}.self_attn.k_proj.weight"], kv_heads))
        add(f"{block}.attn_v.weight", weights[f"{source}.self_attn.v_proj.weight"])
        add(f"{block}.attn_output.weight", weights[f"{source}.self_attn.o_proj.weight"])
        add(f"{block}.ffn_norm.weight", weights[f"{source}.post_attention_layernorm.weight"])
        for part in ("gate", "up", "down"):
            add(f"{block}.ffn_{part}.weight", weights[f"{source}.mlp.{part}_proj.weight"])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def read_case(path: Path, number: int) -> tuple[str, str]:
    """The prompt of a case, up to where the answer begins, and the answer."""
    case = json.loads(path.read_text().splitlines()[number])
    key = case["random_idx"][0]
    return f"{case['prompt']}\nThe <REGISTER_CONTENT> in line {key} is <", str(case["expected_number"])


def run_openvino(task: dict) -> dict:
    """Reads one prompt and answers."""
    import numpy as np
    import openvino as ov
    import openvino_genai
    from tokenizers import Tokenizer

    scheduler = openvino_genai.SchedulerConfig()
    scheduler.enable_prefix_caching = False
    scheduler.max_num_batched_tokens = 512
    scheduler.cache_size = 2
    if "mode" in task:
        scheduler.use_sparse_attention = True
        mode = getattr(openvino_genai.SparseAttentionMode, task["mode"])
        scheduler.sparse_attention_config = openvino_genai.SparseAttentionConfig(mode=mode)
    pipeline = openvino_genai.LLMPipeline(
        task["model"], "CPU", scheduler_config=scheduler, INFERENCE_NUM_THREADS=task["threads"]
    )
    tokenizer = Tokenizer.from_file(str(REFERENCE / "tokenizer.json"))
    text, expected = read_case(Path(task["data"]), task["case"])

    def generate(tokens: list[int], count: int) -> tuple[list[int], tuple[float, float]]:
        """Tokens that follow `tokens`, and the time when the first came: then the prompt is read."""
        settings = openvino_genai.GenerationConfig()
        settings.max_new_tokens, settings.ignore_eos, settings.do_sample = count, True, False
        ids = np.array([tokens], dtype=np.int64)
        inputs = openvino_genai.TokenizedInputs(ov.Tensor(ids), ov.Tensor(np.ones_like(ids)))
        clock, times = peers.Clock(), []

        class Watch(openvino_genai.StreamerBase):
            def write(self, _: int | list[int]) -> openvino_genai.StreamingStatus:
                times.append(clock.read())
                return openvino_genai.StreamingStatus.RUNNING

            def end(self) -> None:
                pass

        return pipeline.generate(inputs, settings, Watch()).tokens[0], times[0]

    tokens = tokenizer.encode(text).ids
    generate(tokens[:64], 2)
    answer, (cpu, wall) = generate(tokens, ANSWER_TOKENS)
    answer = tokenizer.decode(answer).split(">")[0].split("\n")[0].strip()
    return {"tokens": len(tokens), "cpu_seconds": cpu, "seconds": wall, "answer": answer, "right": answer == expected}


def run_iceformer(arguments: argparse.Namespace, folder: Path, case: int) -> dict[str, dict]:
    """Reads one prompt by each method."""
    only = folder / "case.jsonl"
    only.write_text(arguments.data.read_text().splitlines()[case] + "\n")
    command = [str(arguments.iceformer), "eval", "longeval", "--json", "--quiet", "--data", str(only), "--cases", "1"]
    command += ["--methods", "exact,budgeted", "--threads", str(arguments.threads)]
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    records = [json.loads(line) for line in output.splitlines()]
    found = {}
    for record in records:
        if record["record"] == "case" and record["setup"] == "everything":
            found[f"iceformer {record['method']}"] = {
                "tokens": record["tokens"],
                "cpu_seconds": record["text"]["cpu_seconds"] + record["question"]["cpu_seconds"],
                "seconds": record["text"]["seconds"] + record["question"]["seconds"],
                "answer": record["answers"][0],
                "right": record["score"] == 1.0,
            }
    return found


def compare(arguments: argparse.Namespace) -> None:
    model = arguments.environment / "reference.gguf"
    if not model.exists():
        partial = model.with_suffix(".partial")
        write_reference(partial)
        partial.rename(model)
    runs: dict[str, list[dict]] = {name: [] for name in CONTESTANTS}
    for case in range(arguments.cases):
        found = run_iceformer(arguments, arguments.environment, case)
        for name, settings in CONTESTANTS.items():
            if settings is not None:
                task = {"model": str(model), "data": str(arguments.data.resolve()), "case": case}
                task |= {"threads": arguments.threads} | settings
                command = [sys.executable, __file__, "--worker", json.dumps(task)]
                child = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
                lines = [line for line in child.stdout.splitlines() if line.startswith("{")]
                if not lines:
                    reason = child.stderr.strip().splitlines()[-1:] or ["no output"]
                    raise SystemExit(f"error: {name}, case {case}: {reason[0]}")
                found[name] = json.loads(lines[-1])
        for name, run in found.items():
            runs[name].append(run)
            print(f"case {case}, {name}: {run['cpu_seconds']:.2f} CPU s, {run['answer']!r}", file=sys.stderr)
            if arguments.json:
                with arguments.json.open("a") as file:
                    file.write(json.dumps({"case": case, "contestant": name} | run) + "\n")
    tokens = statistics.median(run["tokens"] for run in runs["iceformer exact"])
    print(f"{arguments.data.name}, {tokens:,.0f} tokens, {arguments.cases} cases, {arguments.threads} threads\n")
    print("| contestant | prompt, CPU s | prompt, s | right |\n|---|---:|---:|---:|")
    for name, found in runs.items():
        cpu, wall = (statistics.median(run[field] for run in found) for field in ("cpu_seconds", "seconds"))
        print(f"| {name} | {cpu:.2f} | {wall:.2f} | {sum(run['right'] for run in found)} of {len(found)} |")


if __name__ == "__main__":
    main()
