"""What rounding weights to 8 bits costs:  python bench/int8.py CHECKPOINT [CHECKPOINT ...] [--rows 64]

Held-out text of the demo's datasets, in rows of 256 tokens of each checkpoint's own tokenizer, is read one token at a
time by the decode step of generate.py, in the processor's best format and with --int8: bits per byte, and the mean and
standard error of the difference row by row. A checkpoint may be a folder of Hugging Face's. With 64 rows it adds to
results/bench/int8.json, or int8_fp32.json of a processor without bf16.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
import torch.nn.functional as F

from bench.context import context, positive, publish
from checkpoint import load_model
from config import PRESETS
from decoding import Decode, decode_step
from errors import exit_code_of
from hardware import best_dtype, choose_precision
from metrics import mean_and_error
from model import KVCache
from prepare_data import DatasetPrep

ROOT = Path(__file__).resolve().parent.parent
LENGTH = 256


def nats_of_rows(step: Decode, rows: torch.Tensor, cache: KVCache) -> torch.Tensor:
    """Summed cross-entropy of each of rows (B, T + 1)."""
    nats = torch.zeros(len(rows))
    for t in range(rows.size(1) - 1):
        nats += F.cross_entropy(step(rows[:, t], cache).float(), rows[:, t + 1], reduction="none")
    return nats


@torch.inference_mode()
def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoints", nargs="+", metavar="CHECKPOINT")
    parser.add_argument("--rows", type=positive, default=64, help="of each dataset")
    arguments = parser.parse_args()
    best, dtype = choose_precision(torch.device("cpu"), "auto"), best_dtype(torch.device("cpu"))
    file = f"bench/int8{'_fp32' if best == 'fp32' else ''}.json"
    out = ROOT / "results" / file
    results = json.loads(out.read_text()) if out.exists() else {}
    for name in arguments.checkpoints:
        model, tokenizer, _, _ = load_model(name, "cpu", dtype)
        config = dataclasses.replace(PRESETS["demo"].data, val_tokens=arguments.rows * LENGTH)
        held_out = DatasetPrep(config, LENGTH, config.n_streams, tokenizer=tokenizer).validation_rows()
        rows = torch.cat([torch.from_numpy(each.rows[: arguments.rows].astype("int64")) for each in held_out.values()])
        n_bytes = torch.from_numpy(tokenizer.token_byte_length)[rows[:, 1:]].sum(dim=1)
        bits = {}
        for int8 in (False, True):
            cache = KVCache(model.config, len(rows), LENGTH, torch.device("cpu"), dtype)
            bits[int8] = nats_of_rows(decode_step(model, len(rows), int8), rows, cache) / torch.log(torch.tensor(2.0))
        whole = {int8: float(each.sum() / n_bytes.sum()) for int8, each in bits.items()}
        mean, error = mean_and_error(((bits[True] - bits[False]) / n_bytes.mean(dtype=torch.float32)).tolist())
        print(
            f"{Path(name).name}: {best} {whole[False]:.4f} bits per byte, int8 {mean:+.5f} +- {error:.5f}", flush=True
        )
        results[Path(name).name] = {
            "context": context(), "parameters": model.parameter_counts()["total"], "rows": len(rows),
            best: whole[False], "int8": whole[True], "difference": [mean, error],
        }  # fmt: skip
        publish(parser, file, results, but="checkpoints")
    return 0


if __name__ == "__main__":
    raise SystemExit(exit_code_of(main))
