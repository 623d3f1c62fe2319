"""Show a run's length and its learning-rate schedule, and compare batch sizes.

    python scripts/calc_lr_config.py [--preset demo] [--train.max_steps 2000 ...]

WORLD_SIZE=8 in the environment plans for eight devices.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # works from any folder

from config import RUNS_OPTIONS, Config, load_config, processes
from errors import exit_code_of

WIDTH, HEIGHT = 64, 8  # characters of the picture


def main(argv: Sequence[str] | None = None) -> int:
    config = load_config(argv, "The length of a run and its learning-rate schedule." + RUNS_OPTIONS, Config)
    import torch

    from metrics import amount
    from model import GPT
    from optim import build_optimizers, lr_factor_at
    from plan import run_length

    world_size = processes()
    given = config
    config = given.with_batch_size(given.train.batch_size, given.rows_per_step(world_size), world_size)
    total_steps, per_epoch = run_length(config, world_size)
    tokens_per_epoch = sum(per_epoch.values())
    warmup = config.warmup_steps(world_size)
    config.check_length(total_steps, world_size)
    with torch.device("meta"):
        model = GPT(config.model.resolved(config.data.n_vocab))
    n_parameters, optimizers = model.parameter_counts()["total"], build_optimizers(model, config.train)
    tokens, c = total_steps * config.tokens_per_step(world_size), config.train
    cooldown_from = math.ceil(total_steps * (1 - c.cooldown_fraction))

    print(f"batch       {c.batch_size} rows x {c.gradient_accumulation_steps} accumulated x {world_size} devices "
          f"x {config.model.max_length} = {config.tokens_per_step(world_size):,} tokens per step")  # fmt: skip
    print(f"length      {total_steps:,} steps, {amount(tokens)} tokens, {tokens / n_parameters:,.1f} per parameter")
    if tokens_per_epoch:
        print(f"epochs      {tokens / tokens_per_epoch:.2f} of {amount(tokens_per_epoch)} tokens")
    names = ["lr (all weights)"]
    if c.optimizer == "muon":
        names = ["lr (block matrices)", "head and norms", "embedding"]  # the last not if it is the head's matrix
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    print(f"\n{'':<22}{'peak':>12}{'final':>12}")
    for name, group in zip(names, groups, strict=False):
        print(f"{name:<22}{group['peak_lr']:>12.2e}{group['peak_lr'] * c.final_lr_fraction:>12.2e}")

    if c.lr != given.train.lr:
        per_step, its_own = config.tokens_per_step(world_size), given.train.lr_tokens_per_step
        print(f"(block matrices: train.lr {given.train.lr:g} x ({per_step:,} / {its_own:,} tokens per step)^(1/4))")
    if c.optimizer == "muon":
        others = "head_lr" if config.model.tie_embeddings else "head_lr and embedding_lr"
        width = math.sqrt(768 / config.model.d_model)
        print(f"(the others: train.{others} x sqrt(768 / d_model) = {width:.2f}, whatever the batch)")

    print(f"\nwarm-up to step {warmup:,}, constant, from step {cooldown_from:,} linear to {c.final_lr_fraction:.0%}")
    factors = [lr_factor_at(i * (total_steps - 1) // (WIDTH - 1), total_steps, warmup, c) for i in range(WIDTH)]
    for level in range(HEIGHT, 0, -1):
        bar = "".join("#" if factor * HEIGHT > level - 1 else " " for factor in factors)
        print(f"{c.lr * level / HEIGHT:>10.1e} |{bar}".rstrip())
    print(f"{'':>10} +{'-' * WIDTH}\n{'':>12}0{total_steps:>{WIDTH - 1},}\n")

    print("batches to choose from (same tokens; larger ones take fewer, surer steps", end="")
    print("; set --train.max_steps):\n" if c.max_steps else "):\n")
    muon = c.optimizer == "muon"
    heads = f"{'accumulation':>13}{'rows/step':>11}{'tokens/step':>13}{'steps':>10}{'warm-up':>9}"
    print(heads + f"{'lr':>10}" * muon)
    for accumulation in sorted({1, 2, 4, 8, 16, 32, c.gradient_accumulation_steps}):
        rows = c.batch_size * accumulation * world_size
        per_step = rows * config.model.max_length
        if rows % config.data.n_streams == 0:
            rate = f"{given.train.lr_for(per_step):>10.1e}" if muon else ""
            mark = "  <- yours" if accumulation == c.gradient_accumulation_steps else ""
            steps, warm = math.ceil(tokens / per_step), math.ceil(c.warmup_tokens / per_step)
            print(f"{accumulation:>13}{rows:>11,}{per_step:>13,}{steps:>10,}{warm:>9,}{rate}{mark}")
    if muon and given.train.lr_tokens_per_step:
        print("\n(lr, of block matrices: as train.py has it. It grows with the fourth root of the tokens per step, as")
        print("measured with small models from 2,048 to 32,768 of them; beyond, it is a guess: docs/recipe.md)")
    elif muon:
        print("\n(lr, of block matrices: as given, whatever the batch; not given, it grows with a larger one)")
    return 0


if __name__ == "__main__":
    raise SystemExit(exit_code_of(main))
