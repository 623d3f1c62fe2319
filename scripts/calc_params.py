"""Count a model's parameters, FLOPs, training memory and checkpoints, and compare sizes to choose from.

    python scripts/calc_params.py [--preset gpt2] [--model.d_model 512 ...] [--check_disk]

Nothing is trained or downloaded: the model is built without memory for its weights, and its own count is printed.
(With --train.keep_every in a run by epochs, data that has no description is counted as the run counts it.)
"""

from __future__ import annotations

import dataclasses
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # works from any folder

from config import RUNS_OPTIONS, Config, GPTConfig, load_config, processes
from errors import exit_code_of

WIDTHS = (256, 384, 512, 768, 1024, 1280, 1536, 2048)  # the ladder of the table: 64 of width per layer and head


@dataclasses.dataclass
class Options(Config):
    check_disk: bool = False  # only say whether the disk has room for the run's checkpoints; exit code 6 if not


def main(argv: Sequence[str] | None = None) -> int:
    description = "Parameters, FLOPs and training memory of a model, and of others." + RUNS_OPTIONS
    config = load_config(argv, description, Options)
    if config.check_disk:
        print(room_for_checkpoints(config))
        return 0
    import torch

    from memory import computes_in_16_bits, training_memory
    from metrics import amount
    from model import GPT

    with torch.device("meta"):
        model = GPT(config.model.resolved(config.data.n_vocab))
    c, counts = model.config, model.parameter_counts()
    total = counts["total"]
    print(
        f"{c.n_layers} layers x {c.d_model}, {c.n_heads} heads of {c.head_dim} ({c.n_kv_heads} for keys and values), "
        f"{c.mlp} of {c.d_ff},\ncontext {c.max_length}, vocabulary {c.vocab_size}"
        f"{', tied' if c.tie_embeddings else ''}\n"
    )
    for part, count in counts.items():
        print(f"  {part:<11}{count:>15,}{100 * count / total:>7.1f}%")

    training, forward = model.flops_per_token(), model.flops_per_token(training=False)
    print(f"\nFLOPs per token: {training / 1e6:,.1f} M to train, {forward / 1e6:,.1f} M to read")
    in_16_bits = computes_in_16_bits(config)
    activations = "16 bits" if in_16_bits else "fp32"
    print(f"memory to train (weights, gradients and optimizer state in fp32; activations in {activations}):")
    if not in_16_bits and config.train.precision == "auto":
        print("  (as this machine computes, without bf16; --train.precision bf16 counts as on a GPU)")
    devices = processes()  # start.sh says how many
    memory = training_memory(config, config.train.batch_size, devices)
    parts = {
        "weights": memory.weights, "gradients": memory.gradients,
        f"optimizer ({config.train.optimizer})": memory.optimizer,
        "forward and backward": memory.activations, "update of the weights": memory.update,
    }  # fmt: skip
    for part, n_bytes in parts.items():
        print(f"  {part:<24}{n_bytes / 2**30:>8.2f} GB")
    print(f"  {'at most at a time':<24}{memory.total / 2**30:>8.2f} GB, with batch_size {config.train.batch_size}")
    if config.train.fit_memory:
        print("  (batch_size auto: the run itself chooses it when it starts, by the memory that is free then)")
    print()

    most = most_checkpoints_of(config)
    print(f"a checkpoint: {memory.checkpoint / 2**30:.2f} GB, and at most {most} of them on the disk\n")
    if config.train.max_steps:
        tokens = config.train.max_steps * config.tokens_per_step(devices)
        print(f"this run: {amount(tokens)} tokens on {devices} device{'s' * (devices > 1)}, ", end="")
        print(f"{tokens / total:.1f} per parameter\n")

    print("sizes to choose from, with this vocabulary, context and batch_size (about 20 tokens per parameter")
    print("are compute-optimal, arXiv:2203.15556; more make a better model of that size):\n")
    print(f"{'d_model':>8}{'layers':>8}{'heads':>7}{'parameters':>13}", end="")
    print(f"{'MFLOP/token':>13}{'memory':>10}{'20 tok/param':>14}", flush=True)  # the rows take a second or two each
    for width in sorted({*WIDTHS, config.model.d_model}):
        row = ladder(config.model, width)
        with torch.device("meta"):
            size = GPT(row.resolved(config.data.n_vocab))
        n, flops = size.parameter_counts()["total"], size.flops_per_token()
        its = training_memory(dataclasses.replace(config, model=row), config.train.batch_size, devices)
        gigabytes = its.total / 2**30
        mark = "  <- yours" if row == config.model else ""
        print(
            f"{width:>8}{row.n_layers:>8}{row.n_heads:>7}{n / 1e6:>11,.1f} M{flops / 1e6:>13,.0f}"
            f"{gigabytes:>7,.1f} GB{20 * n / 1e9:>12,.2f} B{mark}",
            flush=True,
        )
    return 0


def most_checkpoints_of(config: Config) -> int:
    """At a time on the disk."""
    from plan import most_checkpoints, run_length

    steps = config.train.max_steps
    if config.train.keep_every and not steps:  # by epochs, whose length depends on the data
        steps, _ = run_length(config, processes())
    return most_checkpoints(config, steps)


def room_for_checkpoints(config: Config) -> str:
    """A line that says how much the run's checkpoints take and where. Raises DiskError when there is less room."""
    from checkpoint import DiskError, list_checkpoints
    from files import PARTIAL
    from memory import training_memory

    size = training_memory(config, 1).checkpoint
    folder = config.train.run_dir.absolute()
    unfinished = sum(file.stat().st_size for file in folder.glob(f"{PARTIAL}*/*"))  # of a killed save; is removed
    place = next(parent for parent in (folder, *folder.parents) if parent.is_dir())
    free = shutil.disk_usage(place).free + unfinished
    # At the end one makes way for the next.
    missing = max(1, most_checkpoints_of(config) - len(list_checkpoints(folder)))
    line = f"checkpoints of {size / 2**30:.2f} GB in {folder}: {missing * size / 2**30:.2f} GB for {missing} more"
    if free < missing * size:
        raise DiskError(
            f"{line}, and {free / 2**30:.2f} GB are free; free some space, choose another --train.out_dir, or keep "
            f"fewer (--train.keep_checkpoints, --train.keep_every)"
        )
    return f"{line[0].upper()}{line[1:]}, of {free / 2**30:.1f} GB free"


def ladder(model: GPTConfig, width: int) -> GPTConfig:
    """The model at another width, with a layer and a head for each 64 of it; its own shape at its own width."""
    if width == model.d_model:
        return model
    heads = width // 64
    return dataclasses.replace(model, d_model=width, n_layers=heads, n_heads=heads, n_kv_heads=0, head_dim=64, d_ff=0)


if __name__ == "__main__":
    raise SystemExit(exit_code_of(main))
