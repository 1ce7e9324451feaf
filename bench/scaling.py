#!/usr/bin/env python3
"""Draws how the time of attention grows with the length of the text: prompt and decode step, by method, both axes
logarithmic, with the exponent of each curve.

    cargo build --release
    iceformer study dump --file NOVEL.txt --tokens 16384 --output novel.dump
    pip install matplotlib
    python3 bench/scaling.py --from novel.dump --layer 3 --output docs/scaling.svg

Queries, keys and values are those of one layer of a real model on a real text (repeated beyond its length, with noise of a
tenth of a standard deviation). Times are CPU seconds of a whole prompt, and of one decode step behind it. A point that
would take longer than --most-seconds, going by the two before it, is left out.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
from datetime import date
from pathlib import Path

PHASES = {"prompt": None, "decode": 1}
NOISE = 0.1
#: The exponent is that of the points from here on: below, fixed costs show.
LEAST_FITTED = 8192


def measure(arguments: argparse.Namespace, method: str, phase: str, tokens: int) -> float:
    """CPU seconds of a call."""
    command = [str(arguments.binary), "bench", "attention", "--json", "--samples", "0", "--method", method]
    command += ["--from", str(arguments.dump), "--layer", str(arguments.layer), "--tokens", str(tokens)]
    command += ["--kv-type", arguments.kv_type, "--threads", str(arguments.threads), "--tile-noise", str(NOISE)]
    if PHASES[phase] is not None:
        command += ["--queries", str(PHASES[phase])]
    command += ["--repeat", str(arguments.repeat if tokens <= arguments.repeated_tokens else 1)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        sys.exit(f"error: {' '.join(command)}: {done.stderr.strip()}")
    return json.loads(done.stdout.splitlines()[0])["cpu_seconds"]


def exponent(points: dict[int, float]) -> float | None:
    """Slope of the line of least squares through the logarithms."""
    fitted = [(math.log(tokens), math.log(seconds)) for tokens, seconds in points.items() if tokens >= LEAST_FITTED]
    if len(fitted) < 2:
        return None
    mean_x, mean_y = (sum(values) / len(fitted) for values in zip(*fitted))
    return sum((x - mean_x) * (y - mean_y) for x, y in fitted) / sum((x - mean_x) ** 2 for x, _ in fitted)


def too_long(points: dict[int, float], tokens: int, most_seconds: float) -> bool:
    if len(points) < 2:
        return False
    (before, earlier), (last, seconds) = list(points.items())[-2:]
    growth = max(math.log(seconds / earlier) / math.log(last / before), 1.0)
    return seconds * (tokens / last) ** growth > most_seconds


def draw(curves: dict[tuple[str, str], dict[int, float]], output: Path, caption: str) -> None:
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "scaling"
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(10, 4.4), constrained_layout=True)
    for axis, phase in zip(axes, PHASES):
        for (method, curve_phase), points in curves.items():
            if curve_phase == phase and points:
                slope = exponent(points)
                label = method if slope is None else f"{method}, exponent {slope:.2f}"
                axis.plot(list(points), list(points.values()), marker="o", markersize=4, label=label)
        axis.set(xscale="log", yscale="log", xlabel="tokens", ylabel="CPU seconds", title=phase)
        ticks = sorted({tokens for points in curves.values() for tokens in points})
        axis.set_xticks(ticks, [f"{tokens // 1024}k" for tokens in ticks])
        axis.minorticks_off()
        axis.grid(True, alpha=0.3)
        axis.legend(fontsize=8)
    figure.suptitle(caption, fontsize=8)
    figure.savefig(output, metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--binary", type=Path, default=Path("target/release/iceformer"))
    parser.add_argument("--from", dest="dump", type=Path, required=True, help="a dump of `iceformer study dump`")
    parser.add_argument("--layer", type=int, default=0)
    parser.add_argument("--methods", nargs="+", default=["exact", "budgeted", "dci"])
    parser.add_argument("--lengths", type=int, nargs="+", default=[1024 << step for step in range(9)])
    parser.add_argument("--kv-type", default="int8")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--repeated-tokens", type=int, default=32768, help="longer prompts run once")
    parser.add_argument("--most-seconds", type=float, default=300.0, help="longest call that is made")
    parser.add_argument("--output", type=Path, required=True, help="SVG file")
    arguments = parser.parse_args()

    curves: dict[tuple[str, str], dict[int, float]] = {
        (method, phase): {} for method in arguments.methods for phase in PHASES
    }
    print("| phase | tokens | " + " | ".join(arguments.methods) + " |\n|---|---:|" + "---:|" * len(arguments.methods))
    for phase in PHASES:
        for tokens in sorted(arguments.lengths):
            cells = []
            for method in arguments.methods:
                points = curves[method, phase]
                skipped = too_long(points, tokens, arguments.most_seconds)
                if not skipped:
                    points[tokens] = measure(arguments, method, phase, tokens)
                cells.append("–" if skipped else f"{points[tokens]:.4g}")
            print(f"| {phase} | {tokens:,} | " + " | ".join(cells) + " |", flush=True)
        slopes = [exponent(curves[method, phase]) for method in arguments.methods]
        cells = ["–" if slope is None else f"{slope:.2f}" for slope in slopes]
        print(f"| {phase} | exponent from {LEAST_FITTED:,} | " + " | ".join(cells) + " |", flush=True)
    caption = f"{arguments.kv_type} cache, layer {arguments.layer} of {arguments.dump.name}, {date.today()}"
    draw(curves, arguments.output, caption)


if __name__ == "__main__":
    main()
