"""Asks a decoder a question about a long text file, with the native engine: no torch needed.

    python ask_a_long_document.py MODEL FILE "Who finds the letter?"

MODEL is a folder with config.json, tokenizer.json and *.safetensors, or a .gguf file.
"""

import argparse
import sys
from pathlib import Path

import iceformer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("file", type=Path)
    parser.add_argument("question")
    parser.add_argument("--max-tokens", type=int, default=128)
    parser.add_argument("--budget", type=float, help="softmax mass that a row may miss; exact unless given")
    arguments = parser.parse_args()

    engine = iceformer.Engine(arguments.model, budget=arguments.budget)
    text = f"{arguments.file.read_text(encoding='utf-8')}\n\n{arguments.question}"
    prompt = [{"role": "user", "content": text}] if engine.has_chat_template else text

    def progress(done: int, total: int) -> None:
        print(f"\rread {done} of {total} tokens", end="" if done < total else "\n", file=sys.stderr, flush=True)

    with engine.generate(prompt, stream=True, max_tokens=arguments.max_tokens, progress=progress) as stream:
        for piece in stream:
            print(piece, end="", flush=True)
    answer = stream.answer
    print(f"\n[{answer.prompt_tokens} tokens read in {answer.prompt_seconds:.1f} s, {answer.finish}]", file=sys.stderr)


if __name__ == "__main__":
    main()
