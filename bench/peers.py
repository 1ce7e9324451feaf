"""Times whole prompts: IceFormer beside OpenVINO GenAI and llama.cpp, on the same files, interleaved.

    cargo build --release
    python3 bench/peers.py --lengths 4096 16384 --repeats 3

Needs Python 3 with venv and pip. The peers are installed from PyPI into a virtual environment outside the repository,
and models of random weights are written beside it; both are kept for the next run. Every run of a contestant is a
process of its own, so its CPU seconds and its peak memory are those the operating system counted. Contestants take
turns, so that what else the machine does hits all of them; the table holds medians.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import statistics
import subprocess
import sys
import time
import venv
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
PACKAGES = ["openvino-genai", "llama-cpp-python", "gguf", "numpy"]

VOCABULARY = 32000
# name: (layers, width, query heads, key/value heads, head width, feed-forward width)
SHAPES = {
    "tiny": (2, 256, 4, 2, 64, 512),
    "small": (8, 1024, 16, 4, 64, 2816),
    "llama-1b": (16, 2048, 32, 8, 64, 8192),
}

# name: (worker, weight type of the file, settings of the worker)
CONTESTANTS = {
    "iceformer-bf16": ("iceformer", "bf16", {}),
    "iceformer-q8_0": ("iceformer", "q8_0", {}),
    "iceformer-q4_k": ("iceformer", "q4_k_m", {}),
    "openvino": ("openvino", "f16", {}),
    "openvino-q8_0": ("openvino", "q8_0", {}),
    "llama.cpp": ("llama_cpp", "q8_0", {"flash": None}),
    "llama.cpp-no-flash": ("llama_cpp", "q8_0", {"flash": False}),
    "llama.cpp-no-flash-k-q8_0": ("llama_cpp", "q8_0", {"flash": False, "key_type": "q8_0"}),
    "llama.cpp-bf16-no-flash": ("llama_cpp", "bf16", {"flash": False}),
    "llama.cpp-q4_0-no-flash": ("llama_cpp", "q4_0", {"flash": False}),
}
DEFAULT = ["iceformer-bf16", "iceformer-q8_0", "iceformer-q4_k", "openvino", "llama.cpp", "llama.cpp-no-flash"]


def main() -> None:
    arguments = parse()
    if arguments.worker:
        run_worker(json.loads(arguments.worker))
        return
    python = make_environment(arguments.environment)
    if sys.prefix == sys.base_prefix or Path(sys.prefix) != arguments.environment:
        # Go on inside the environment, which has the packages that write models.
        os.execv(python, [str(python), __file__, *sys.argv[1:]])
    if arguments.install_only:
        return
    compare(arguments)


def parse() -> argparse.Namespace:
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "iceformer"
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--environment", type=Path, default=cache / "peers", help="virtual environment [%(default)s]")
    parser.add_argument("--models", type=Path, default=cache / "models", help="folder of the models [%(default)s]")
    parser.add_argument("--shape", choices=SHAPES, default="llama-1b", help="shape of the model [%(default)s]")
    parser.add_argument("--lengths", type=int, nargs="+", default=[4096], help="tokens of the prompts [4096]")
    parser.add_argument("--generate", type=int, default=16, help="tokens generated after each prompt [%(default)s]")
    parser.add_argument("--repeats", type=int, default=3, help="runs of each contestant [%(default)s]")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="threads of each contestant [%(default)s]")
    parser.add_argument(
        "--contestants",
        nargs="+",
        default=DEFAULT,
        choices=CONTESTANTS,
        metavar="NAME",
        help=f"any of {', '.join(CONTESTANTS)} [{' '.join(DEFAULT)}]",
    )
    parser.add_argument("--kv-type", default="int8", choices=["f32", "bf16", "int8"], help="cache of IceFormer [int8]")
    parser.add_argument(
        "--iceformer", type=Path, default=REPOSITORY / "target/release/iceformer", help="its binary [%(default)s]"
    )
    parser.add_argument("--json", type=Path, help="also writes every run to this file, one JSON object a line")
    parser.add_argument("--install-only", action="store_true", help="installs the peers and ends")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    for name in ("lengths", "generate", "repeats", "threads"):
        values = getattr(arguments, name)
        if min(values if isinstance(values, list) else [values]) < 1:
            parser.error(f"--{name}: expected at least 1")
    arguments.environment = arguments.environment.resolve()
    return arguments


def make_environment(folder: Path) -> Path:
    """Installs the peers into `folder` unless they are there; gives its Python."""
    python = folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    stamp = folder / "installed"
    if not stamp.exists() or stamp.read_text() != " ".join(PACKAGES):
        print(f"installing {', '.join(PACKAGES)} into {folder}", file=sys.stderr)
        if not python.exists():
            venv.create(folder, with_pip=True)
        subprocess.run([python, "-m", "pip", "install", "--quiet", *PACKAGES], check=True)
        stamp.write_text(" ".join(PACKAGES))
    return python


# ---- Models


def vocabulary() -> tuple[list[str], list[str]]:
    """A byte-level BPE vocabulary of made-up words, with its merges: letters, pairs, triples, then fours."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = (chr(256 + index) for index in range(256))
    pieces = [chr(byte) if byte in printable else next(others) for byte in range(256)]
    letters, merges = [chr(ord("a") + index) for index in range(26)], []
    level = letters
    while len(pieces) < VOCABULARY - 2:
        level = [(start, letter) for start in level for letter in letters]
        merges += [f"{start} {letter}" for start, letter in level]
        level = [start + letter for start, letter in level]
        pieces += level
    count = VOCABULARY - 2 - 256
    return pieces[: VOCABULARY - 2] + ["<s>", "</s>"], merges[:count]


def write_model(path: Path, shape: str) -> None:
    """Writes a GGUF file of f16 random weights in the manner of llama.cpp's converter."""
    import gguf
    import numpy as np

    layers, width, heads, kv_heads, head_dim, inner = SHAPES[shape]
    random = np.random.default_rng(1)

    def matrix(rows: int, columns: int) -> np.ndarray:
        values = random.standard_normal((rows, columns), dtype=np.float32)
        return (values / columns**0.5).astype(np.float16)

    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name(f"random weights, shape {shape}")
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_F16)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_context_length(131072)
    writer.add_embedding_length(width)
    writer.add_block_count(layers)
    writer.add_feed_forward_length(inner)
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_rope_dimension_count(head_dim)
    writer.add_rope_freq_base(500000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(VOCABULARY)
    pieces, merges = vocabulary()
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("llama-bpe")
    writer.add_token_list(pieces)
    writer.add_token_types([gguf.TokenType.NORMAL] * (VOCABULARY - 2) + [gguf.TokenType.CONTROL] * 2)
    writer.add_token_merges(merges)
    writer.add_bos_token_id(VOCABULARY - 2)
    writer.add_eos_token_id(VOCABULARY - 1)
    writer.add_tensor("token_embd.weight", matrix(VOCABULARY, width))
    writer.add_tensor("output_norm.weight", np.ones(width, np.float32))
    writer.add_tensor("output.weight", matrix(VOCABULARY, width))
    for layer in range(layers):
        block = f"blk.{layer}"
        writer.add_tensor(f"{block}.attn_norm.weight", np.ones(width, np.float32))
        writer.add_tensor(f"{block}.attn_q.weight", matrix(heads * head_dim, width))
        writer.add_tensor(f"{block}.attn_k.weight", matrix(kv_heads * head_dim, width))
        writer.add_tensor(f"{block}.attn_v.weight", matrix(kv_heads * head_dim, width))
        writer.add_tensor(f"{block}.attn_output.weight", matrix(width, heads * head_dim))
        writer.add_tensor(f"{block}.ffn_norm.weight", np.ones(width, np.float32))
        writer.add_tensor(f"{block}.ffn_gate.weight", matrix(inner, width))
        writer.add_tensor(f"{block}.ffn_up.weight", matrix(inner, width))
        writer.add_tensor(f"{block}.ffn_down.weight", matrix(width, inner))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def quantise(source: Path, target: Path, kind: str) -> None:
    """Lets llama.cpp write `source` in another type."""
    import ctypes

    import llama_cpp

    settings = llama_cpp.llama_model_quantize_default_params()
    settings.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{kind.upper()}")
    settings.allow_requantize = True
    if llama_cpp.llama_model_quantize(str(source).encode(), str(target).encode(), ctypes.byref(settings)) != 0:
        raise SystemExit(f"error: llama.cpp does not write {target}")


def model(folder: Path, shape: str, kind: str) -> Path:
    """The file of a shape and weight type, written when it is not there."""
    # The name holds what the file depends on, so that a change of this script does not leave an old file in use.
    version = hashlib.sha256(repr((SHAPES[shape], VOCABULARY, 1)).encode()).hexdigest()[:8]
    path = folder / f"{shape}-{version}-{kind}.gguf"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        print(f"writing {path}", file=sys.stderr)
        partial = path.with_suffix(".partial")
        # In a process of its own: llama.cpp writes a line for every tensor, and the peak memory of this process would
        # count for the contestants it starts.
        task = {"worker": "write", "target": str(partial), "shape": shape}
        if kind != "f16":
            task = {"worker": "quantise", "target": str(partial), "kind": kind}
            task["source"] = str(model(folder, shape, "f16"))
        subprocess.run(worker_command(task), check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        partial.rename(path)
    return path


# ---- Workers: each runs in a process of its own and prints one JSON object


def worker_command(task: dict) -> list[str]:
    return [sys.executable, __file__, "--worker", json.dumps(task)]


def run_worker(task: dict) -> None:
    if task["worker"] == "quantise":
        quantise(Path(task["source"]), Path(task["target"]), task["kind"])
        return
    if task["worker"] == "write":
        write_model(Path(task["target"]), task["shape"])
        return
    result = {"openvino": run_openvino, "llama_cpp": run_llama_cpp}[task["worker"]](task)
    print("\n" + json.dumps(result), flush=True)
    # Some runtimes crash while they are taken down; the result is out.
    os._exit(0)


def prompt(tokens: int) -> list[int]:
    """Token ids below the special ones, in no order."""
    return [1000 + index * 7919 % (VOCABULARY - 2000) for index in range(tokens)]


class Clock:
    """CPU and wall seconds of this process since it was made."""

    def __init__(self) -> None:
        self.cpu, self.wall = time.process_time(), time.perf_counter()

    def read(self) -> tuple[float, float]:
        return time.process_time() - self.cpu, time.perf_counter() - self.wall


def run_openvino(task: dict) -> dict:
    import numpy as np
    import openvino as ov
    import openvino_genai

    scheduler = openvino_genai.SchedulerConfig()
    scheduler.enable_prefix_caching = False
    scheduler.max_num_batched_tokens = task.get("chunk", 512)
    scheduler.cache_size = 4
    pipeline = openvino_genai.LLMPipeline(
        task["model"], "CPU", scheduler_config=scheduler, INFERENCE_NUM_THREADS=task["threads"]
    )

    class Watch(openvino_genai.StreamerBase):
        """Reads the clock when the first token comes: then the prompt is read."""

        def __init__(self) -> None:
            super().__init__()
            self.first, self.clock = None, Clock()

        def write(self, tokens: int | list[int]) -> openvino_genai.StreamingStatus:
            self.first = self.first or self.clock.read()
            return openvino_genai.StreamingStatus.RUNNING

        def end(self) -> None:
            pass

    def generate(tokens: list[int], count: int) -> tuple[Watch, float]:
        settings = openvino_genai.GenerationConfig()
        settings.max_new_tokens, settings.ignore_eos, settings.do_sample = count, True, False
        ids = np.array([tokens], dtype=np.int64)
        inputs = openvino_genai.TokenizedInputs(ov.Tensor(ids), ov.Tensor(np.ones_like(ids)))
        watch = Watch()
        pipeline.generate(inputs, settings, watch)
        return watch, watch.clock.read()[1]

    generate(prompt(64), 2)
    watch, wall = generate(prompt(task["tokens"]), task["generate"] + 1)
    return {
        "prompt_cpu_seconds": watch.first[0],
        "prompt_wall_seconds": watch.first[1],
        "decode_tokens_per_second": task["generate"] / (wall - watch.first[1]),
    }


def run_llama_cpp(task: dict) -> dict:
    import llama_cpp

    settings = {"type_k": llama_cpp.GGML_TYPE_Q8_0} if task.get("key_type") == "q8_0" else {}
    if task["flash"] is not None:
        settings["flash_attn"] = task["flash"]
    runner = llama_cpp.Llama(
        task["model"],
        n_ctx=task["tokens"] + task["generate"] + 8,
        n_batch=512,
        n_ubatch=512,
        n_threads=task["threads"],
        n_threads_batch=task["threads"],
        verbose=False,
        **settings,
    )
    runner.eval(prompt(64))
    runner.reset()
    clock = Clock()
    runner.eval(prompt(task["tokens"]))
    cpu, wall = clock.read()
    clock = Clock()
    for _ in range(task["generate"]):
        runner.eval([1234])
    return {
        "prompt_cpu_seconds": cpu,
        "prompt_wall_seconds": wall,
        "decode_tokens_per_second": task["generate"] / clock.read()[1],
    }


# ---- Comparison


def run_contestant(name: str, length: int, arguments: argparse.Namespace) -> dict:
    """One run in a process of its own: what it prints, and what the system counted."""
    worker, kind, settings = CONTESTANTS[name]
    path = model(arguments.models, arguments.shape, kind)
    if worker == "iceformer":
        command = [str(arguments.iceformer), "bench", "prompt", "--json", "--model", str(path)]
        command += ["--tokens", str(length), "--generate", str(arguments.generate)]
        command += ["--threads", str(arguments.threads), "--kv-type", arguments.kv_type]
    else:
        task = {"worker": worker, "model": str(path), "tokens": length, "generate": arguments.generate}
        command = worker_command(task | {"threads": arguments.threads} | settings)
    environment = os.environ | {"OMP_NUM_THREADS": str(arguments.threads)}
    child = subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment, text=True
    )
    output, errors = child.communicate() if os.name == "nt" else (child.stdout.read(), child.stderr.read())
    _, status, usage = os.wait4(child.pid, 0)
    child.returncode = os.waitstatus_to_exitcode(status)
    lines = [line for line in output.splitlines() if line.startswith("{")]
    if child.returncode != 0 or not lines:
        reason = errors.strip().splitlines()[-1:] or ["no output"]
        raise SystemExit(f"error: {name} at {length} tokens ended with {child.returncode}: {reason[0]}")
    result = json.loads(lines[-1])
    # Peak memory is counted in KiB on Linux and in bytes on macOS.
    peak = usage.ru_maxrss * (1 if platform.system() == "Darwin" else 1024)
    return {
        "contestant": name,
        "shape": arguments.shape,
        "tokens": length,
        "threads": arguments.threads,
        "prompt_cpu_seconds": result["prompt_cpu_seconds"],
        "prompt_wall_seconds": result.get("prompt_wall_seconds") or length / result["prompt_tokens_per_second"],
        "decode_tokens_per_second": result["decode_tokens_per_second"],
        "process_cpu_seconds": usage.ru_utime + usage.ru_stime,
        "peak_resident_bytes": peak,
    }


def compare(arguments: argparse.Namespace) -> None:
    if any(CONTESTANTS[name][0] == "iceformer" for name in arguments.contestants) and not arguments.iceformer.exists():
        raise SystemExit(f"error: {arguments.iceformer} is missing; build it with: cargo build --release")
    for name in arguments.contestants:
        model(arguments.models, arguments.shape, CONTESTANTS[name][1])
    runs = []
    for length in arguments.lengths:
        for repeat in range(arguments.repeats):
            for name in arguments.contestants:
                run = run_contestant(name, length, arguments)
                runs.append(run)
                print(
                    f"{length} tokens, run {repeat + 1}, {name}: prompt {run['prompt_cpu_seconds']:.1f} CPU s, "
                    f"{run['prompt_wall_seconds']:.1f} s",
                    file=sys.stderr,
                )
                if arguments.json:
                    with arguments.json.open("a") as file:
                        file.write(json.dumps(run) + "\n")
    print_tables(runs, arguments)


def print_tables(runs: list[dict], arguments: argparse.Namespace) -> None:
    versions = subprocess.run(
        [sys.executable, "-m", "pip", "list", "--format=json", "--disable-pip-version-check"],
        capture_output=True,
        check=True,
    )
    installed = {package["name"].replace("_", "-").lower(): package["version"] for package in json.loads(versions.stdout)}
    print(
        f"Shape `{arguments.shape}`, {arguments.threads} threads, {arguments.repeats} interleaved runs, medians; "
        f"OpenVINO GenAI {installed['openvino-genai']}, llama-cpp-python {installed['llama-cpp-python']}; "
        f"{processor()}.\n"
    )
    best = min(
        (name for name in arguments.contestants if CONTESTANTS[name][0] == "iceformer"),
        key=lambda name: sum(median(runs, name, length, "prompt_cpu_seconds") for length in arguments.lengths),
        default=arguments.contestants[0],
    )
    for length in arguments.lengths:
        ours = median(runs, best, length, "prompt_cpu_seconds")
        print(f"### {length:,} tokens\n")
        print(f"| contestant | prompt, CPU s | beside {best} | prompt, s | decode, tokens/s | peak memory, MiB |")
        print("|---|---:|---:|---:|---:|---:|")
        for name in arguments.contestants:
            cpu = median(runs, name, length, "prompt_cpu_seconds")
            decode = median(runs, name, length, "decode_tokens_per_second")
            print(
                f"| {name} | {cpu:.1f} | {cpu / ours:.2f}× | {median(runs, name, length, 'prompt_wall_seconds'):.1f} "
                f"| {'–' if decode is None else f'{decode:.1f}'} "
                f"| {median(runs, name, length, 'peak_resident_bytes') / 2**20:.0f} |"
            )
        print()


def median(runs: list[dict], name: str, length: int, field: str) -> float | None:
    values = [run[field] for run in runs if run["contestant"] == name and run["tokens"] == length]
    return None if None in values else statistics.median(values)


def processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


if __name__ == "__main__":
    main()
