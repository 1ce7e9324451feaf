"""Embeds text files with a sentence-transformers encoder and prints which are alike.

    python embed_long_documents.py MODEL FILE...

MODEL is the name or folder of an encoder whose family has transformers' attention interface (BERT, XLM-R, ModernBERT,
…). Long files are read up to the length the model takes.
"""

import argparse
import time
from pathlib import Path

import iceformer.sentence_transformers
import iceformer.transformers


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument("--budget", type=float, help="softmax mass that a row may miss; exact unless given")
    arguments = parser.parse_args()

    model = iceformer.sentence_transformers.load(arguments.model)
    texts = [path.read_text(encoding="utf-8", errors="replace") for path in arguments.files]
    start = time.perf_counter()
    with iceformer.transformers.settings(budget=arguments.budget):
        vectors = model.encode(texts, normalize_embeddings=True, show_progress_bar=False)
    seconds = time.perf_counter() - start
    print(f"{len(texts)} documents in {seconds:.2f} s; last call: {iceformer.transformers.last_report()}")
    for index, path in enumerate(arguments.files):
        likeness = sorted(
            (
                (float(vectors[index] @ vectors[other]), arguments.files[other])
                for other in range(len(texts))
                if other != index
            ),
            reverse=True,
        )
        nearest = f"nearest {likeness[0][1].name} ({likeness[0][0]:.3f})" if likeness else "alone"
        print(f"{path.name}: {nearest}")


if __name__ == "__main__":
    main()
