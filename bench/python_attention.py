"""Measures the Python package: IceFormer beside torch's SDPA and eager attention, interleaved in one process.

    python bench/python_attention.py attention --lengths 512 2048 8192 --widths 64 128 --dtypes float32 bfloat16
    python bench/python_attention.py long-range-arena --batch 1
    python bench/python_attention.py models --models modernbert xlm-r llama-1b --lengths 8192
    python bench/python_attention.py dumps novel.dump --budget 0.05

Needs the package with torch and transformers (`pip install "./crates/python[transformers]"`). Figures are CPU seconds
of the whole process (all its threads, those that wait spinning included) and wall seconds, medians of the rounds; ratios
are medians of the ratios within a round. Contestants take turns, so that what else the machine does hits all of them.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from datetime import date

import iceformer
import iceformer.transformers as hook
import torch
from iceformer._operator import eager

# name: (batch entries that one example is, tokens, seconds of the paper's eager attention, seconds of IceFormer) of the
# five tasks of the Long Range Arena, two layers of width 64 with two heads of 32 (arXiv 2405.02842, §5.1).
ARENA = {
    "ListOps": (1, 2048, 2.918, 0.373),
    "Text": (1, 4096, 0.689, 0.092),
    "Retrieval": (2, 4096, 8.341, 0.843),
    "Image": (1, 1024, 4.931, 0.502),
    "Pathfinder": (1, 1024, 0.960, 0.306),
}
#: Memory that eager attention may take for its scores: the matrix, its softmax, and a copy of it.
MOST_EAGER_BYTES = 12 << 30


def measure(
    contestants: dict[str, Callable[[], object]], rounds: int, seconds: float
) -> dict[str, list[tuple[float, float]]]:
    """`(CPU seconds, wall seconds)` of a call, by contestant and round. A short call is repeated within its turn until
    the turn takes `seconds`."""
    repeats = {}
    for name, call in contestants.items():
        call()
        repeats[name] = 1
        if seconds > 0:
            start = time.perf_counter()
            call()
            repeats[name] = max(1, round(seconds / max(time.perf_counter() - start, 1e-6)))
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in contestants}
    for _ in range(rounds):
        for name, call in contestants.items():
            # Threads of the contestant before may still wait spinning.
            time.sleep(0.02)
            cpu, wall = time.process_time(), time.perf_counter()
            for _ in range(repeats[name]):
                call()
            times[name].append(
                ((time.process_time() - cpu) / repeats[name], (time.perf_counter() - wall) / repeats[name])
            )
    return times


def row(label: dict[str, object], times: dict[str, list[tuple[float, float]]], arguments: argparse.Namespace) -> None:
    base = times["iceformer"]
    found: dict[str, object] = dict(label)
    for name, rounds in times.items():
        found[f"{name} cpu s"] = statistics.median(cpu for cpu, _ in rounds)
        found[f"{name} wall s"] = statistics.median(wall for _, wall in rounds)
        if name != "iceformer":
            ratios = [(cpu / own_cpu, wall / own_wall) for (cpu, wall), (own_cpu, own_wall) in zip(rounds, base)]
            found[f"{name} / iceformer cpu"] = statistics.median(cpu for cpu, _ in ratios)
            found[f"{name} / iceformer wall"] = statistics.median(wall for _, wall in ratios)
    if arguments.json:
        print(json.dumps(found), flush=True)
        return
    columns = {
        **label,
        **{name.removesuffix(" cpu s"): f"{value:.4g} s" for name, value in found.items() if name.endswith(" cpu s")},
        **{
            name.removesuffix(" / iceformer cpu") + " / iceformer": f"{value:.2f}x"
            for name, value in found.items()
            if name.endswith(" / iceformer cpu")
        },
    }
    if tuple(columns) != getattr(arguments, "header", None):
        arguments.header = tuple(columns)
        print("\n| " + " | ".join(columns) + " |\n|" + "---|" * len(columns))
    print("| " + " | ".join(str(value) for value in columns.values()) + " |", flush=True)


def ours(arguments: argparse.Namespace, queries, keys, values, causal: bool) -> dict[str, Callable[[], object]]:
    settings = {"causal": causal, "threads": arguments.threads}
    calls = {"iceformer": lambda: iceformer.attention(queries, keys, values, method="exact", **settings)}
    if arguments.budget is not None:
        calls["budgeted"] = lambda: iceformer.attention(
            queries, keys, values, method="budgeted", budget=arguments.budget, **settings
        )
    if arguments.dci:
        calls["dci"] = lambda: iceformer.attention(queries, keys, values, method="dci", **settings)
    return calls


def attention(arguments: argparse.Namespace) -> None:
    for dtype in arguments.dtypes:
        for width in arguments.widths:
            for causal in {"full": [False], "causal": [True], "both": [False, True]}[arguments.masks]:
                for tokens in arguments.lengths:
                    generator = torch.Generator().manual_seed(tokens)
                    shape = (arguments.batch, arguments.heads, tokens, width)
                    arrays = [torch.randn(shape, generator=generator).to(getattr(torch, dtype)) for _ in range(3)]
                    contestants = ours(arguments, *arrays, causal)
                    contestants["sdpa"] = lambda: torch.nn.functional.scaled_dot_product_attention(
                        *arrays, is_causal=causal
                    )
                    if arguments.eager and arguments.batch * arguments.heads * tokens**2 * 8 <= MOST_EAGER_BYTES:
                        mask = torch.ones(tokens, tokens, dtype=torch.bool).tril() if causal else None
                        contestants["eager"] = lambda: eager(*arrays, mask, width**-0.5)
                    label = {"dtype": dtype, "width": width, "mask": "causal" if causal else "full", "tokens": tokens}
                    row(label, measure(contestants, arguments.rounds, arguments.seconds), arguments)


def long_range_arena(arguments: argparse.Namespace) -> None:
    ratios = []
    for task, (entries, tokens, paper_eager, paper_iceformer) in ARENA.items():
        tokens = min(tokens, arguments.most_tokens or tokens)
        generator = torch.Generator().manual_seed(tokens)
        shape = (arguments.batch * entries, 2, tokens, 32)
        layers = [[torch.randn(shape, generator=generator) for _ in range(3)] for _ in range(2)]

        def each(call: Callable[..., object]) -> Callable[[], object]:
            return lambda: [call(*layer) for layer in layers]

        settings = {"threads": arguments.threads}
        contestants = {"iceformer": each(lambda *layer: iceformer.attention(*layer, method="exact", **settings))}
        if arguments.budget is not None:
            budget = {"method": "budgeted", "budget": arguments.budget, **settings}
            contestants["budgeted"] = each(lambda *layer: iceformer.attention(*layer, **budget))
        contestants["sdpa"] = each(torch.nn.functional.scaled_dot_product_attention)
        contestants["eager"] = each(lambda *layer: eager(*layer, None, 32**-0.5))
        times = measure(contestants, arguments.rounds, arguments.seconds)
        ratios.append(statistics.median(other[0] / own[0] for other, own in zip(times["eager"], times["iceformer"])))
        label = {"task": task, "batch": shape[0], "tokens": tokens, "paper": f"{paper_eager / paper_iceformer:.1f}x"}
        row(label, times, arguments)
    print(f"\nmean of eager / iceformer: {statistics.mean(ratios):.2f}x (the paper's mean: 7.63x)")


def dumps(arguments: argparse.Namespace) -> None:
    """All layers of queries, keys and values that `iceformer study dump` wrote."""
    from safetensors import safe_open

    for path in arguments.files:
        with safe_open(path, "pt") as file:
            described = file.metadata()
            layers = sorted({int(name.split(".")[1]) for name in file.keys()})

            def heads_first(layer: int, part: str) -> torch.Tensor:
                rows = file.get_tensor(f"layer.{layer}.{part}")[: arguments.tokens]
                return rows.float().transpose(0, 1).contiguous()[None]

            inputs = [tuple(heads_first(layer, part) for part in ("queries", "keys", "values")) for layer in layers]
        if described["window"] != "none":
            raise SystemExit(f"{path} is of a model with sliding windows ({described['window']}); expected none")
        causal, scale = described["causal"] == "true", float(described["scale"])
        settings = {"causal": causal, "scale": scale, "threads": arguments.threads}

        def each(method: str, **more: object) -> Callable[[], object]:
            return lambda: [iceformer.attention(*layer, method=method, **settings, **more) for layer in inputs]

        budget = {"budget": arguments.budget or 0.05}
        contestants = {
            "iceformer": each("exact"),
            "budgeted": each("budgeted", **budget),
            "budgeted f32": each("budgeted", kv_type="f32", **budget),
        }
        if arguments.sdpa:
            contestants["sdpa"] = lambda: [
                torch.nn.functional.scaled_dot_product_attention(*layer, is_causal=causal, scale=scale, enable_gqa=True)
                for layer in inputs
            ]
        masses, rounded, rows = [], 0, 0
        for layer in inputs:
            exact = iceformer.attention(*layer, method="exact", **settings)
            found, report = iceformer.attention(*layer, method="budgeted", return_report=True, **settings, **budget)
            masses.append(missed_mass(exact, found, layer[2], causal).flatten())
            rounded, rows = rounded + report.rounded_rows, rows + report.rows
        missed = torch.cat(masses)
        label: dict[str, object] = {"dump": os.path.basename(path), "tokens": inputs[0][0].shape[2]}
        label["rounded"] = f"{rounded / rows:.2f}"
        for share in (0.5, 0.95, 0.99):
            label[f"missed p{share * 100:.0f}"] = f"{torch.kthvalue(missed, int(share * len(missed))).values:.4f}"
        row(label, measure(contestants, arguments.rounds, 0.0), arguments)


def missed_mass(exact: torch.Tensor, found: torch.Tensor, values: torch.Tensor, causal: bool) -> torch.Tensor:
    """See docs/accuracy.md; `[batch, query_heads, tokens]`, of outputs as `iceformer.attention` gives them."""
    values = values.double()
    if causal:
        seen = torch.arange(1, values.shape[2] + 1)[:, None]
        sums, squares = values.cumsum(2), (values**2).cumsum(2)
    else:
        seen = torch.tensor(values.shape[2])
        sums, squares = values.sum(2, keepdim=True), (values**2).sum(2, keepdim=True)
    variance = (squares / seen - (sums / seen) ** 2).sum(3).clamp(min=1e-12)
    spread = variance.sqrt().repeat_interleave(exact.shape[1] // values.shape[1], dim=1)
    return ((found - exact).norm(dim=3) / (2**0.5 * spread)).clamp(max=1)


def random_model(name: str, layers: int | None):
    """A model of the shape of a known one with random weights; returns it and whether it is a decoder."""
    import transformers as tf

    token = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    if name == "modernbert":
        config, kind = tf.ModernBertConfig(**token, cls_token_id=1, sep_token_id=2), tf.ModernBertModel
    elif name == "xlm-r":
        config, kind = tf.XLMRobertaConfig(vocab_size=32000, max_position_embeddings=8194, **token), tf.XLMRobertaModel
    elif name == "llama-1b":
        config = tf.LlamaConfig(
            vocab_size=32000,
            hidden_size=2048,
            intermediate_size=8192,
            num_hidden_layers=16,
            num_attention_heads=32,
            num_key_value_heads=8,
            max_position_embeddings=131072,
            **token,
        )
        kind = tf.LlamaModel
    else:
        config = tf.LlamaConfig(
            vocab_size=1000,
            hidden_size=256,
            intermediate_size=512,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=131072,
            **token,
        )
        kind = tf.LlamaModel
    if layers is not None:
        config.num_hidden_layers = layers
        if getattr(config, "layer_types", None):
            config.layer_types = config.layer_types[:layers]
    torch.manual_seed(0)
    return kind._from_config(config).eval(), kind is tf.LlamaModel


def models(arguments: argparse.Namespace) -> None:
    for name in arguments.models:
        model, decoder = random_model(name, arguments.layers)
        for dtype in arguments.dtypes:
            model.to(getattr(torch, dtype))
            for tokens in arguments.lengths:
                ids = torch.randint(3, model.config.vocab_size, (arguments.batch, tokens))
                heads = model.config.num_attention_heads

                def call(implementation: str, **settings: object) -> Callable[[], object]:
                    def run() -> object:
                        model.set_attn_implementation(implementation)
                        with hook.settings(threads=arguments.threads, **settings):
                            return model(ids, **({"use_cache": False} if decoder else {}))

                    return run

                contestants = {"iceformer": call("iceformer", method="exact")}
                if arguments.budget is not None:
                    contestants["budgeted"] = call("iceformer", method="budgeted", budget=arguments.budget)
                contestants["sdpa"] = call("sdpa")
                if arguments.eager and arguments.batch * heads * tokens**2 * 12 <= MOST_EAGER_BYTES:
                    contestants["eager"] = call("eager")
                label = {"model": name, "layers": model.config.num_hidden_layers, "dtype": dtype, "tokens": tokens}
                row(label, measure(contestants, arguments.rounds, 0.0), arguments)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--threads", type=int, default=iceformer.available_threads())
    common.add_argument("--rounds", type=int, default=5)
    common.add_argument("--seconds", type=float, default=0.2, help="least wall seconds of a turn")
    common.add_argument("--batch", type=int, default=1)
    common.add_argument("--budget", type=float, help="measure method budgeted too, with this budget")
    common.add_argument("--no-eager", dest="eager", action="store_false")
    common.add_argument("--json", action="store_true", help="one JSON object for each row")
    one = commands.add_parser("attention", parents=[common], help="attention alone")
    one.add_argument("--lengths", type=int, nargs="+", default=[512, 2048, 8192, 32768])
    one.add_argument("--widths", type=int, nargs="+", default=[64, 128])
    one.add_argument("--heads", type=int, default=8)
    one.add_argument("--dci", action="store_true", help="measure method dci too")
    one.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    one.add_argument("--masks", choices=["full", "causal", "both"], default="both")
    one.set_defaults(run=attention)
    arena = commands.add_parser("long-range-arena", parents=[common], help="the attention of the five tasks")
    arena.add_argument("--most-tokens", type=int, help="cut the tasks, to try the script")
    arena.set_defaults(run=long_range_arena)
    whole = commands.add_parser("models", parents=[common], help="whole models of random weights in transformers")
    whole.add_argument(
        "--models",
        nargs="+",
        default=["modernbert", "xlm-r", "llama-1b"],
        choices=["modernbert", "xlm-r", "llama-1b", "tiny"],
    )
    whole.add_argument("--lengths", type=int, nargs="+", default=[8192])
    whole.add_argument("--layers", type=int, help="fewer layers than the model has")
    whole.add_argument("--dtypes", nargs="+", default=["float32"])
    whole.set_defaults(run=models)
    real = commands.add_parser("dumps", parents=[common], help="attention of a real model, which `study dump` wrote")
    real.add_argument("files", nargs="+", metavar="DUMP")
    real.add_argument("--tokens", type=int, help="the first tokens only")
    real.add_argument("--no-sdpa", dest="sdpa", action="store_false")
    real.set_defaults(run=dumps)
    return parser.parse_args()


def main() -> None:
    arguments = parse()
    torch.set_num_threads(arguments.threads)
    kernels = {name: iceformer.kernel(name) for name in ("f32", "bf16")}
    facts = {
        "command": " ".join(sys.argv),
        "date": str(date.today()),
        "processor": processor(),
        "cores": os.cpu_count(),
        "threads": arguments.threads,
        "torch": torch.__version__,
        "iceformer": iceformer.__version__,
        "kernels": kernels,
    }
    if arguments.json:
        print(json.dumps(facts))
    else:
        print("\n".join(f"{name}: {value}" for name, value in facts.items()))
    with torch.inference_mode():
        arguments.run(arguments)


def processor() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


if __name__ == "__main__":
    main()
