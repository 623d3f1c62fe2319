"""Time to a given held-out loss, beside a peer:  python bench/time_to_loss.py [--seconds 300] [--fp32]

The peer is transformers' GPT2LMHeadModel with AdamW, trained as nanoGPT trains it: compiled, in bf16 where the
processor has instructions for it (--fp32: as shipped), linear warm-up and cosine, at its best learning rate. (A short
run prefers a higher one than a long run: so the two best of a quarter of the time are tried for all of it.) It sees the
demo's own rows (tokenizer, mix, context, held-out documents) and has the demo's depth, width and batch. It trains for
so many seconds, compilation counted, validation not. Then ours: `train.py --preset demo --train.max_steps N`,
compilation counted, with the least N (to one in forty) after which its held-out bits per byte are at or under the
peer's. (Of both, torch's cache has the compiled code after their first run.) With the default settings it adds to
results/bench/time_to_loss.json, or time_to_loss_fp32.json of a processor without bf16.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from bisect import bisect_left
from collections.abc import Iterable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ.setdefault("GOMP_SPINCOUNT", "10000")  # as train.py

RATES = (5e-4, 1e-3, 2e-3, 4e-3, 8e-3)
OUR_STEPS = (10, 15, 20, 25, 30, 40, 50, 60, 80, 100, 120, 150, 180, 220, 260, 320, 400, 480, 560)


def train_peer(seconds: float, lr: float, fp32: bool, seed: int) -> dict[str, float]:
    """Train the peer for so many seconds; its steps and its held-out bits per byte over both datasets."""
    import torch

    from bench.peers import MeanLoss, adamw, cosine, gpt2, held_out_bits
    from config import PRESETS
    from hardware import best_dtype
    from prepare_data import DatasetPrep

    config = PRESETS["demo"]
    length = config.model.max_length
    data = DatasetPrep(config.data, length, config.rows_per_step())
    torch.manual_seed(seed)
    peer = MeanLoss(
        gpt2(config.model.d_model, config.model.n_layers, config.model.n_heads, length, config.data.n_vocab)
    )
    optimizer = adamw(peer, lr)
    trained = peer if fp32 else torch.compile(peer)
    in_bf16 = not fp32 and best_dtype(torch.device("cpu")) == torch.bfloat16
    precision = torch.autocast("cpu", dtype=torch.bfloat16) if in_bf16 else contextlib.nullcontext()

    started = time.perf_counter()
    step, total, compiled = 0, 200, 0.0  # a guess, for the rate of two steps
    while (elapsed := time.perf_counter() - started) < seconds:
        if step == 1:
            compiled = elapsed
        if step > 1:  # the steps that there is time for, as known so far
            total = step + max(1, int((seconds - elapsed) / ((elapsed - compiled) / (step - 1))))
        batch = next(data)
        for group in optimizer.param_groups:
            group["lr"] = lr * cosine(step, total)
        with precision:
            loss = trained(torch.from_numpy(batch.inputs.copy()), torch.from_numpy(batch.targets.copy()))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(peer.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        step += 1
    data.close()

    with precision:
        bits_per_byte = held_out_bits(lambda ids: peer.model(ids).logits, data)
    return {"lr": lr, "steps": step, "bits_per_byte": bits_per_byte}


def train_ours(steps: int, seed: int, folder: Path) -> dict[str, float]:
    """A run of train.py with so many steps: the seconds of its steps, compilation counted, and its bits per byte.

    Its warm-up is the demo's 20 steps, in a run under 80 steps a quarter of them.
    """
    from config import PRESETS

    demo = PRESETS["demo"]
    warmup_tokens = min(demo.train.warmup_tokens, steps // 4 * demo.tokens_per_step())
    command = [
        sys.executable, str(ROOT / "train.py"), "--preset", "demo", "--train.max_steps", str(steps),
        "--train.run_name", f"ours-{steps}", "--train.out_dir", str(folder), "--train.seed", str(seed),
        "--train.eval_every", "1000", "--train.save_every", "1000", "--train.warmup_tokens", str(warmup_tokens),
    ]  # fmt: skip
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    lines = (folder / f"ours-{steps}" / "metrics.jsonl").read_text().splitlines()
    last = [r for r in map(json.loads, lines) if r["kind"] == "validation"][-1]
    return {"steps": steps, "seconds": last["seconds"], "bits_per_byte": last["datasets"]["all"]["bits_per_byte"]}


def fewest_steps(goal: float, seed: int, folder: Path, at: int) -> tuple[bool, dict[str, float]]:
    """Whether ours gets to so many bits per byte; and its shortest run that does, to one step in forty, or its last.

    Numbers of steps are tried from OUR_STEPS[at] on.
    """

    def run(steps: int) -> tuple[bool, dict[str, float]]:
        ours = train_ours(steps, seed, folder)
        print(f"  ours: {ours['bits_per_byte']:.4f} after {ours['seconds']:.0f} s and {steps} steps", flush=True)
        return ours["bits_per_byte"] <= goal, ours

    too_few = 0
    for steps in OUR_STEPS[at:]:
        reached, ours = run(steps)
        if reached:
            break
        too_few = steps
    while reached and steps - too_few > max(1, steps // 40):
        fewer = (steps + too_few) // 2
        if (trial := run(fewer))[0]:
            steps, ours = fewer, trial[1]
        else:
            too_few = fewer
    return reached, ours


def main() -> int:
    from bench.context import PEER, context, need, positive, publish

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=positive, default=300)
    parser.add_argument("--fp32", action="store_true")
    parser.add_argument("--seeds", type=positive, default=3)
    arguments = parser.parse_args()

    import torch

    from hardware import choose_precision

    need(PEER)
    precision = choose_precision(torch.device("cpu"), "auto")
    name = "gpt2 fp32" if arguments.fp32 else f"gpt2 {precision} compiled"

    def tried(seconds: float, rates: Iterable[float]) -> list[dict[str, float]]:
        """The peer's runs at some learning rates, the best one first."""
        trials = []
        for lr in rates:
            trials.append({"of seconds": seconds} | train_peer(seconds, lr, arguments.fp32, seed=0))
            print(f"{name}, lr {lr:.1e}, {seconds:.0f} s: {trials[-1]['bits_per_byte']:.3f} bits per byte", flush=True)
        return sorted(trials, key=lambda t: t["bits_per_byte"])

    short = tried(arguments.seconds / 4, RATES)
    whole = tried(arguments.seconds, [t["lr"] for t in short[:2]])
    best = whole[0]["lr"]
    pairs: list[dict[str, Any]] = []
    at = 0  # of OUR_STEPS, where the last seed arrived
    with tempfile.TemporaryDirectory() as folder:
        for seed in range(arguments.seeds):
            peer = train_peer(arguments.seconds, best, arguments.fp32, seed) if seed else whole[0]
            print(f"{name}: {peer['bits_per_byte']:.4f} after {arguments.seconds:.0f} s and {peer['steps']} steps")
            reached, ours = fewest_steps(peer["bits_per_byte"], seed, Path(folder) / str(seed), max(0, at - 1))
            at = bisect_left(OUR_STEPS, ours["steps"]) if reached else 0
            ratio = arguments.seconds / ours["seconds"] if reached else None
            pairs.append({"seed": seed, "peer": peer, "ours": ours, "ratio": ratio})
            print(f"  {ratio:.1f} times as fast" if ratio else "  not reached in so many steps", flush=True)
    file = f"bench/time_to_loss{'_fp32' if precision == 'fp32' else ''}.json"
    out = ROOT / "results" / file
    results = json.loads(out.read_text()) if out.exists() else {}
    results[name] = {"context": context(), "learning rates tried": short + whole, "runs": pairs}
    publish(parser, file, results, but="fp32")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
