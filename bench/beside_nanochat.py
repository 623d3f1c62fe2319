"""Beside nanochat's model and optimizer:  python bench/beside_nanochat.py CLONE [--steps 300] [--seeds 3]

CLONE is a folder of nanochat (https://github.com/karpathy/nanochat; its code is run from there, none of it is here).
Its GPT, with all that ours has not (value embeddings, smear, softcap ...), and its MuonAdamW are trained on the demo's
rows at the demo's width, depth, heads and batch, in bf16, compiled, by the schedules of its scripts/base_train.py; its
rates, which are meant for batches of half a million tokens, by the best of several factors, its own rule for small
batches among them. Then train.py for as many steps; with --equal_time nanochat gets as many fewer as each of its steps
took longer when timed, so that both train equally long on a machine of their own. Prints and adds to
results/bench/nanochat.json: held-out bits per byte; and, taking turns on both models for some rounds, the seconds of a
step, which need a quiet machine.
--common OPTIONS change the preset, for both.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shlex
import statistics
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch

from bench.ablate import run
from bench.context import context, positive
from bench.peers import held_out_bits
from config import Config, load_config
from files import write_json
from hardware import choose_precision, compile_for_training
from model import GPT
from optim import build_optimizers
from prepare_data import DatasetPrep

FACTORS = (1.0, 0.3)


class Nanochat:
    """Its model, compiled, with its optimizer; one step of training at a time."""

    def __init__(self, clone: Path, config: Config, factor: float, seed: int):
        sys.path.insert(0, str(clone))
        os.environ["NANOCHAT_DTYPE"] = "bfloat16"
        from nanochat.gpt import GPT as TheirGPT, GPTConfig as TheirConfig

        m = config.model
        torch.manual_seed(seed)
        self.model = TheirGPT(
            TheirConfig(m.max_length, config.data.n_vocab, m.n_layers, m.n_heads, m.n_heads, m.d_model, "L")
        )
        self.model.init_weights()
        rates = {"unembedding_lr": 0.008, "embedding_lr": 0.3, "scalar_lr": 0.5, "matrix_lr": 0.02}
        self.optimizer = self.model.setup_optimizer(
            weight_decay=0.28, **{name: rate * factor for name, rate in rates.items()}
        )
        self.compiled = torch.compile(self.model, dynamic=False)

    def step(self, inputs: np.ndarray, targets: np.ndarray, done: int, steps: int) -> None:
        """inputs, targets (B, T); done: optimizer steps before this one, of so many in all."""
        cool = (done - 0.35 * steps) / (0.65 * steps)  # how far into the cool-down, from 0 to 1
        momentum = 0.97 - 0.07 * cool if cool >= 0 and done >= 400 else 0.85 + 0.12 * min(1, done / 400)
        for group in self.optimizer.param_groups:
            group["lr"] = group["initial_lr"] * (min(1, (done + 1) / 40) if cool < 0 else 1 - 0.95 * cool)
            if group["kind"] == "muon":
                group["momentum"] = momentum
                group["weight_decay"] = 0.28 * 0.5 * (1 + math.cos(math.pi * done / steps))
        self.compiled(torch.from_numpy(inputs.copy()).long(), torch.from_numpy(targets.copy()).long()).backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)


def train_nanochat(clone: Path, config: Config, factor: float, seed: int, steps: int) -> float:
    """Held-out bits per byte over all datasets after so many steps."""
    config.data.seed = seed + 1  # as bench/ablate.py, so that both see the same rows
    data = DatasetPrep(config.data, config.model.max_length, config.rows_per_step())
    peer = Nanochat(clone, config, factor, seed)
    for done in range(steps):
        batch = next(data)
        peer.step(batch.inputs, batch.targets, done, steps)
    data.close()
    return held_out_bits(peer.model, data)


class Ours:
    """The same step of ours, as train.py does it."""

    def __init__(self, config: Config):
        self.model = GPT(config.model.resolved(config.data.n_vocab))
        self.optimizers = build_optimizers(self.model, config.train)
        compile_for_training(self.model, self.model.device)
        assert choose_precision(torch.device("cpu"), config.train.precision) == "bf16"

    def step(self, inputs: np.ndarray, targets: np.ndarray, done: int, steps: int) -> None:
        x, y = torch.from_numpy(inputs.copy()).long(), torch.from_numpy(targets.copy()).long()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            nats = self.model(x, y)
        (nats / y.numel()).backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)


def time_steps(clone: Path, config: Config, rounds: int) -> dict[str, Any]:
    """Seconds of a step, in turns of five steps each."""
    both: dict[str, Any] = {"ours": Ours(config), "nanochat": Nanochat(clone, config, 1.0, 0)}
    rng = np.random.default_rng(0)
    rows = rng.integers(0, config.data.n_vocab, (config.rows_per_step(), config.model.max_length + 1))
    taken: dict[str, list[float]] = {name: [] for name in both}
    for model in both.values():
        for _ in range(3):
            model.step(rows[:, :-1], rows[:, 1:], 0, 100)
    for _ in range(rounds):
        for name, model in both.items():
            started = time.perf_counter()
            for _ in range(5):
                model.step(rows[:, :-1], rows[:, 1:], 0, 100)
            taken[name].append((time.perf_counter() - started) / 5)
    sizes = {name: sum(p.numel() for p in model.model.parameters()) for name, model in both.items()}
    return {"context": context(), "parameters": sizes, "seconds": taken, "threads": torch.get_num_threads()}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("clone", type=Path)
    parser.add_argument("--steps", type=positive, default=300)
    parser.add_argument("--seeds", type=int, default=3, help="0: only the seconds of a step")
    parser.add_argument("--rounds", type=int, default=5, help="of the timing; 0: none")
    parser.add_argument("--equal_time", action="store_true")
    parser.add_argument("--common", default="")
    arguments = parser.parse_args()
    if not (arguments.clone / "nanochat" / "gpt.py").is_file():
        parser.error(f"{arguments.clone} is no clone of nanochat: it has no nanochat/gpt.py")

    config = load_config(["--preset", "demo", *shlex.split(arguments.common)], "", Config)
    out = Path(__file__).resolve().parent.parent / "results" / "bench" / "nanochat.json"
    everything = json.loads(out.read_text()) if out.exists() else {}
    results = everything.setdefault(f"demo {arguments.common}".strip(), {})
    if arguments.rounds:
        timed = results["a step"] = time_steps(arguments.clone, config, arguments.rounds)
        medians = {name: statistics.median(values) for name, values in timed["seconds"].items()}
        print(f"a step: ours {medians['ours']:.3f} s, nanochat {medians['nanochat']:.3f} s", flush=True)
    if arguments.seeds:
        own_rule = math.sqrt(config.tokens_per_step() / 2**19)  # rates by the root of the batch
        name, steps, factors = "held out", arguments.steps, (*FACTORS, own_rule)
        if arguments.equal_time:
            medians = {name: statistics.median(values) for name, values in results["a step"]["seconds"].items()}
            name, steps = "held out, equal time", round(arguments.steps * medians["ours"] / medians["nanochat"])
            factors = FACTORS  # its own rule was far behind at equal steps
        found = {f: train_nanochat(arguments.clone, config, f, 0, steps) for f in factors}
        for factor, bits in found.items():
            print(f"nanochat, its rates x {factor:.3f}, seed 0: {bits:.4f}", flush=True)
        best = min(found, key=lambda f: found[f])
        results[name] = held_out = {"context": context(), "steps": arguments.steps, "ours": [], "nanochat": []}
        held_out["nanochat's steps"] = steps
        held_out["factors"] = {f"{factor:.3f}": bits for factor, bits in found.items()}
        for seed in range(arguments.seeds):
            theirs = train_nanochat(arguments.clone, config, best, seed, steps) if seed else found[best]
            ours = run("demo", arguments.steps, seed, "", arguments.common)
            print(f"seed {seed}: nanochat {theirs:.4f}, ours {ours:.4f}", flush=True)
            held_out["nanochat"].append(theirs)
            held_out["ours"].append(ours)
    write_json(out, everything)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
