"""Embeds every text file of a folder on a Ray cluster (or on this machine, where there is none).

    pip install "./crates/python[ray,sentence-transformers]"
    python documents_with_ray.py MODEL FOLDER OUTPUT --actors 2 --threads 1

Writes Parquet files with the columns path, text and embedding to OUTPUT.
"""

import argparse

import iceformer.ray
import ray


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("folder")
    parser.add_argument("output")
    parser.add_argument("--actors", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1, help="threads of each actor")
    arguments = parser.parse_args()

    files = ray.data.read_binary_files(arguments.folder, include_paths=True)
    documents = files.map(lambda row: {"path": row["path"], "text": row["bytes"].decode("utf-8", "replace")})
    embedded = documents.map_batches(
        iceformer.ray.Embed,
        fn_constructor_kwargs={"model": arguments.model, "threads": arguments.threads},
        concurrency=arguments.actors,
        num_cpus=arguments.threads,
        batch_size=16,
    )
    embedded.write_parquet(arguments.output)
    print(f"{embedded.count()} documents in {arguments.output}")


if __name__ == "__main__":
    main()
