"""Does the cost grow as the operations do?  python bench/scaling.py [--rounds 3]

1. Training: seconds per token of models of five widths against their FLOPs per token (6 layers, heads of 64 channels;
   16 rows x 256, vocabulary 4,096, compiled forward and backward): a straight line through the origin would be a
   constant share of the machine's peak.
2. Decoding: tokens per second of the demo's model, with a context of 2,048, at the position it has reached; with the
   cache, and computing all positions anew for each token.
With the default settings it writes results/bench/scaling.json and scaling.png.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ.setdefault("GOMP_SPINCOUNT", "10000")  # as train.py

WIDTHS = (128, 192, 256, 384, 512)
ROWS, LENGTH, VOCABULARY = 16, 256, 4096
POSITIONS = (32, 128, 512, 1024, 2000)


def training(rounds: int) -> dict[str, list[float]]:
    """Seconds per token of the forward and backward pass, by width; and the FLOPs per token."""
    import torch

    from config import GPTConfig
    from hardware import best_dtype, compile_for_training
    from model import GPT

    x, y = torch.randint(0, VOCABULARY, (2, ROWS, LENGTH))
    models: dict[int, Any] = {}
    flops: list[float] = []
    for width in WIDTHS:
        shape = GPTConfig(d_model=width, n_layers=6, n_heads=width // 64, max_length=LENGTH)
        model = GPT(shape.resolved(VOCABULARY))
        flops.append(model.flops_per_token())
        compile_for_training(model, model.device)
        models[width] = model

    def once(width: int) -> float:
        started = time.perf_counter()
        with torch.autocast("cpu", torch.bfloat16, enabled=best_dtype(x.device) == torch.bfloat16):
            nats = models[width](x, y)
        nats.backward()
        return (time.perf_counter() - started) / x.numel()

    for width in WIDTHS:
        for _ in range(2):
            once(width)
    seconds = {width: [min(once(width) for _ in range(3)) for _ in range(rounds)] for width in WIDTHS}
    return {"flops per token": flops, "seconds per token": [statistics.median(s) for s in seconds.values()]}


def decoding(rounds: int) -> dict[str, list[float]]:
    """Tokens per second at each of POSITIONS."""
    import torch

    from config import PRESETS
    from decoding import decode_step
    from hardware import best_dtype
    from model import GPT, KVCache

    shape = PRESETS["demo"].model.resolved(PRESETS["demo"].data.n_vocab)
    shape.max_length = max(POSITIONS) + 48
    dtype = best_dtype(torch.device("cpu"))
    model = GPT(shape).to(dtype).eval()
    step = decode_step(model)
    cached, anew = [], []
    with torch.inference_mode():
        for position in POSITIONS:
            ids = torch.ones((1, position), dtype=torch.long)
            speeds: tuple[list[float], list[float]] = ([], [])
            for _ in range(rounds):
                cache = KVCache(shape, 1, position + 40, model.device, dtype)
                model(ids, cache=cache, last_only=True)
                started = time.perf_counter()
                for _ in range(32):
                    step(ids[:, -1], cache)
                speeds[0].append(32 / (time.perf_counter() - started))
                started = time.perf_counter()
                model(ids, last_only=True)
                speeds[1].append(1 / (time.perf_counter() - started))
            cached.append(statistics.median(speeds[0]))
            anew.append(statistics.median(speeds[1]))
    return {"positions": list(POSITIONS), "with the cache": cached, "without": anew}


def main() -> int:
    from bench.context import context, positive, publish

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=positive, default=3)
    rounds = parser.parse_args().rounds

    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    trained, decoded = training(rounds), decoding(rounds)
    print(f"{'width':>6}{'MFLOP/token':>13}{'us/token':>10}{'GFLOP/s':>9}")
    for width, flops, seconds in zip(WIDTHS, trained["flops per token"], trained["seconds per token"], strict=True):
        print(f"{width:>6}{flops / 1e6:>13.1f}{seconds * 1e6:>10.1f}{flops / seconds / 1e9:>9,.0f}")
    print(f"\n{'position':>8}{'tokens/s':>10}{'without a cache':>17}")
    for row in zip(*decoded.values(), strict=True):
        print(f"{row[0]:>8}{row[1]:>10,.0f}{row[2]:>17,.1f}")
    results = {"context": context(), "training": trained, "decoding": decoded}
    if not publish(parser, "bench/scaling.json", results):
        return 0

    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    x = [f / 1e6 for f in trained["flops per token"]]
    y = [s * 1e6 for s in trained["seconds per token"]]
    left.plot(x, y, "o-")
    for width, a, b in zip(WIDTHS, x, y, strict=True):
        left.annotate(str(width), (a, b), textcoords="offset points", xytext=(6, -10))
    left.axline((0, 0), (x[-1], y[-1]), color="grey", linestyle="--", label="in proportion to the largest")
    left.set(
        xlabel="MFLOP per token", ylabel="microseconds per token", title="Training: forward and backward, by width"
    )
    left.set(xlim=(0, None), ylim=(0, None))
    left.legend()
    right.plot(decoded["positions"], decoded["with the cache"], "o-", label="with the cache")
    right.plot(decoded["positions"], decoded["without"], "o-", label="all positions anew")
    right.set(yscale="log", xlabel="position", ylabel="tokens per second", title="Decoding, one text")
    right.legend()
    figure.savefig(ROOT / "results" / "bench" / "scaling.png", dpi=110)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
