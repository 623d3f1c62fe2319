"""Training throughput and memory beside a peer:  python bench/train_speed.py [--rounds 11]

One optimizer step of 16 rows x 256 tokens at 6 layers x 384, vocabulary 4,096: ours (compiled; Muon and AdamW), ours
with activation checkpointing, and transformers' GPT2LMHeadModel with fused AdamW as shipped (fp32), with bf16 autocast,
and compiled as well. All take turns in one process, with the best matrix product of the machine measured in between.
Memory is the highest resident size of a process of its own after three steps, less what it had before the model was
built, when steps of a tiny one had imported all there is to import, the compiler too; the median of three processes.
And the same for 4 rows x 1,024 tokens at GPT-2's size, 12 layers x 768 with 50,304 tied entries. For all, malloc gives
back what a first pass frees and keeps what is freed from then on, as in train.py. A processor without instructions for
bf16, where it would take a hundred times as long, has all of them in fp32.
With the default settings it writes results/bench/train_speed.json, or train_speed_fp32.json for such a processor.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from config import GPTConfig

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ.setdefault("GOMP_SPINCOUNT", "10000")  # as train.py


class Shape(NamedTuple):
    """Of the model, and of its micro-batch."""

    d_model: int
    n_layers: int
    n_heads: int
    max_length: int
    n_vocab: int
    rows: int
    tied: bool  # ours; GPT-2 always is

    def ours(self) -> GPTConfig:
        from config import GPTConfig

        config = GPTConfig(
            d_model=self.d_model, n_layers=self.n_layers, n_heads=self.n_heads, max_length=self.max_length,
            tie_embeddings=self.tied,
        )  # fmt: skip
        return config.resolved(self.n_vocab)


SHAPES = {"small": Shape(384, 6, 6, 256, 4096, 16, tied=False), "gpt2": Shape(768, 12, 12, 1024, 50304, 4, tied=True)}


def contenders() -> list[str]:
    best = best_format()
    return [*dict.fromkeys(("ours", "ours checkpointed", f"gpt2 {best} compiled", f"gpt2 {best}", "gpt2 fp32"))]


def best_format() -> str:
    import torch

    from hardware import choose_precision

    return choose_precision(torch.device("cpu"), "auto")


def build(name: str, shape: Shape) -> tuple[Callable[[], None], Callable[[], None]]:
    """(forward and backward, the optimizer's step) of a contender, on the same random rows."""
    import torch

    from bench.peers import MeanLoss, adamw, gpt2
    from config import TrainingConfig
    from hardware import compile_for_training
    from model import GPT
    from optim import build_optimizers

    torch.manual_seed(0)
    x, y = torch.randint(0, shape.n_vocab, (2, shape.rows, shape.max_length))
    if name.startswith("ours"):
        model = GPT(shape.ours())
        model.activation_checkpointing = "checkpointed" in name
        optimizers = build_optimizers(model, TrainingConfig())
        compile_for_training(model, model.device)
        trained, scale = model, 1 / y.numel()
    else:
        peer = MeanLoss(gpt2(*shape[:5]))
        optimizers = [adamw(peer, 1e-3)]
        trained, scale = torch.compile(peer) if "compiled" in name else peer, 1.0

    fp32 = best_format() == "fp32" or "fp32" in name

    def forward_backward() -> None:
        with contextlib.nullcontext() if fp32 else torch.autocast("cpu", dtype=torch.bfloat16):
            loss = trained(x, y)
        (loss * scale).backward()

    def update() -> None:
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    return forward_backward, update


def peak_memory(name: str, shape: Shape) -> float:
    """MB that three steps of a contender need at most, beyond what the imports take."""
    import torch

    from hardware import give_back_freed_memory, keep_freed_memory

    def three_steps(shape: Shape) -> None:
        give_back_freed_memory()
        forward_backward, update = build(name, shape)
        for _ in range(3):
            forward_backward()
            keep_freed_memory()
            update()

    # Tiny, as what is freed is kept.
    three_steps(Shape(8 * shape.n_heads, 1, shape.n_heads, max_length=32, n_vocab=64, rows=1, tied=shape.tied))
    torch.compiler.reset()  # or the peer is compiled for any shape, as its second one
    gc.collect()
    before = int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    three_steps(shape)
    status = Path("/proc/self/status").read_text()  # not getrusage, which begins with the peak of the parent
    return (int(status.split("VmHWM:")[1].split()[0]) * 1024 - before) / 1e6


def memory_of_a_process(name: str, of: str) -> int:
    command = [sys.executable, __file__, "--memory", name, of]
    return round(float(subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout.split()[-1]))


def main() -> int:
    from bench.context import PEER, context, need, positive, publish

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=positive, default=11)
    parser.add_argument("--memory", nargs=2, help=argparse.SUPPRESS)  # a contender and a shape
    arguments = parser.parse_args()
    if arguments.memory:
        name, of = arguments.memory
        if name not in contenders() or of not in SHAPES:
            parser.error(f"--memory takes one of {', '.join(contenders())}, and {' or '.join(SHAPES)}")
        print(peak_memory(name, SHAPES[of]))
        return 0

    import torch

    from bench.peers import gemm_peak
    from hardware import best_dtype, give_back_freed_memory, keep_freed_memory
    from model import GPT

    need(PEER)
    best = best_format()
    small = SHAPES["small"]
    give_back_freed_memory()
    built = {name: build(name, small) for name in contenders()}
    for forward_backward, _ in built.values():
        forward_backward()
    keep_freed_memory()
    for forward_backward, update in built.values():
        for _ in range(3):  # compiles, and warms up
            forward_backward()
            update()
    tokens = small.rows * small.max_length
    flops = GPT(small.ours()).flops_per_token() * tokens

    peaks: list[float] = []
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in built}
    for _ in range(arguments.rounds):
        for name, (forward_backward, update) in built.items():
            peaks.append(gemm_peak(best_dtype(torch.device("cpu"))))
            pairs = []
            for _ in range(3):
                started = time.perf_counter()
                forward_backward()
                middle = time.perf_counter()
                update()
                pairs.append((middle - started, time.perf_counter() - started))
            seconds[name].append(sorted(pairs)[1])
    peak = statistics.median(peaks)

    results: dict[str, Any] = {"context": context(), "gemm peak GFLOP/s": round(peak / 1e9), "our FLOPs a step": flops}
    print(f"{best} matrix product: {peak / 1e9:,.0f} GFLOP/s; a step of ours: {flops / 1e9:,.0f} GFLOP\n")
    columns = f"{'fwd+bwd ms':>11}{'step ms':>9}{'tok/s':>8}{'vs ours':>9}{'memory MB':>11}{'at GPT-2':>10}"
    print(f"{'':<20}{columns}  of the peak")
    ours = statistics.median(s for _, s in seconds["ours"])
    for name in built:
        fb, step = (statistics.median(column) for column in zip(*seconds[name], strict=True))
        memory = {of: [memory_of_a_process(name, of) for _ in range(3)] for of in SHAPES}
        median = {of: statistics.median(values) for of, values in memory.items()}
        share = f"{flops / fb / peak:.1%} fwd+bwd, {flops / step / peak:.1%} step" if name == "ours" else ""
        print(
            f"{name:<20}{fb * 1e3:>11.0f}{step * 1e3:>9.0f}{tokens / step:>8,.0f}{ours / step:>8.2f}x"
            f"{median['small']:>11,}{median['gpt2']:>10,}  {share}"
        )
        results[name] = {
            "forward and backward ms": [round(fb * 1e3, 1) for fb, _ in seconds[name]],
            "step ms": [round(step * 1e3, 1) for _, step in seconds[name]],
            "tokens/s": round(tokens / step), "speed as a share of ours": round(ours / step, 3),
            "peak memory MB": memory["small"], "peak memory MB at GPT-2's size": memory["gpt2"],
        }  # fmt: skip
        if name == "ours":
            results[name] |= {"of the peak": {"forward and backward": flops / fb / peak, "step": flops / step / peak}}
    publish(parser, f"bench/train_speed{'_fp32' if best == 'fp32' else ''}.json", results)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
