"""Runs that divide the model among two processes (train.fsdp): the same training, in half of the memory each."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.test_train import FP32, Runs, assert_same_training, weights

# Everything that dividing could get wrong: weights whose parts end within a matrix (grouped heads), accumulation,
# and held-out rows (33) of which one process has a batch more than the other.
SMALL = (
    *FP32, "--model.n_kv_heads", "1", "--train.batch_size", "1", "--train.gradient_accumulation_steps", "2",
    "--train.max_steps", "12", "--train.save_every", "6", "--train.eval_every", "6", "--data.val_tokens", "2112",
)  # fmt: skip
ALONE = ("--train.gradient_accumulation_steps", "4")  # the same rows per step in one process
FSDP = ("--train.fsdp",)


@pytest.fixture(scope="module")
def alone(runs: Runs) -> str:
    """A run of one process with the whole model."""
    return runs("alone", *SMALL, *ALONE)[0]


@pytest.fixture(scope="module")
def divided(runs: Runs) -> list[dict[str, int]]:
    """The same run in two processes with half of it each; what each of them held at its end."""
    import torch

    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    arguments = runs.command("divided", *SMALL, *FSDP)[2:]  # behind the interpreter and the script
    torch.multiprocessing.spawn(train_and_count, (port, str(runs.folder), arguments), nprocs=2)
    return [json.loads((runs.folder / f"held-{rank}.json").read_text()) for rank in range(2)]


def train_and_count(rank: int, port: int, folder: str, arguments: list[str]) -> None:
    """A process of a run, which notes how many numbers it held when it saved."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    import checkpoint
    import train

    gather_tensors = checkpoint.gather_tensors

    def gather_and_count(model: Any, optimizers: Any, keep: bool) -> Any:
        gathered = gather_tensors(model, optimizers, keep)
        state = [value for o in optimizers for values in o.state.values() for value in values.values() if value.dim()]
        held = {"weights": sum(p.to_local().numel() for p in model.parameters())}
        held["state"] = sum(value.to_local().numel() for value in state)
        held["gathered"] = len(gathered["model"]) + len(gathered["optimizer"])
        Path(folder, f"held-{rank}.json").write_text(json.dumps(held))
        return gathered

    checkpoint.gather_tensors = gather_and_count
    assert train.main(arguments) == 0


def forget_the_end(runs: Runs, name: str, copy: str) -> None:
    """A copy of a run as it would be if it had been killed behind step 6."""
    shutil.copytree(runs.folder / name, runs.folder / copy)
    shutil.rmtree(runs.checkpoint(copy, 12))


def held_out(runs: Runs, name: str) -> list[float]:
    return [r["datasets"]["all"]["loss"] for r in runs.records(name) if r["kind"] == "validation"]


def test_a_divided_run_trains_like_one_process_with_the_whole_model(
    runs: Runs, alone: str, divided: list[dict[str, int]]
) -> None:
    assert_same_training(runs, "divided", "alone")
    assert held_out(runs, "divided") == pytest.approx(held_out(runs, "alone"), rel=1e-3)
    assert len(held_out(runs, "divided")) == 2


def test_each_process_holds_half_of_the_weights_and_of_the_optimizers_state(
    runs: Runs, alone: str, divided: list[dict[str, int]]
) -> None:
    from safetensors.torch import load_file

    whole = {kind: load_file(runs.checkpoint("alone", 12) / f"{kind}.safetensors") for kind in ("model", "optimizer")}
    for name, kind in (("weights", "model"), ("state", "optimizer")):
        total = sum(tensor.numel() for tensor in whole[kind].values() if tensor.dim())
        assert divided[0][name] + divided[1][name] == total
        assert 0.49 < divided[0][name] / total < 0.51
    assert divided[0]["gathered"] == len(whole["model"]) + len(whole["optimizer"])
    assert divided[1]["gathered"] == 0  # only the process that writes keeps what is gathered for a checkpoint


def test_the_checkpoint_of_a_divided_run_is_like_any_other(
    runs: Runs, alone: str, divided: list[dict[str, int]]
) -> None:
    import torch
    from safetensors.torch import load_file

    from checkpoint import load_model

    for file in ("model.safetensors", "optimizer.safetensors"):
        ours, theirs = (load_file(runs.checkpoint(name, 6) / file) for name in ("divided", "alone"))
        assert {name: (t.shape, t.dtype) for name, t in ours.items()} == {
            n: (t.shape, t.dtype) for n, t in theirs.items()
        }
    model, _, _, step = load_model(runs.folder / "divided")
    assert step == 12
    assert model(torch.zeros(1, 4, dtype=torch.long)).isfinite().all()


def test_a_divided_run_continues_in_one_process(runs: Runs, divided: list[dict[str, int]]) -> None:
    forget_the_end(runs, "divided", "united")
    runs("united", *SMALL, "--resume")
    assert runs.losses("united") == pytest.approx(runs.losses("divided"), rel=1e-3)


def test_a_run_of_one_process_continues_divided(runs: Runs, alone: str) -> None:
    forget_the_end(runs, "alone", "parted")
    runs("parted", *SMALL, *FSDP, "--resume", processes=2)
    assert runs.losses("parted") == pytest.approx(runs.losses("alone"), rel=1e-3)


def test_a_divided_run_that_was_killed_continues_with_the_same_bits(runs: Runs, divided: list[dict[str, int]]) -> None:
    forget_the_end(runs, "divided", "again")
    runs("again", *SMALL, *FSDP, "--resume", processes=2)
    assert weights(runs.checkpoint("again", 12)) == weights(runs.checkpoint("divided", 12))
    assert runs.losses("again") == runs.losses("divided")


def test_tied_embeddings_and_adamw_are_divided_too(runs: Runs) -> None:
    from safetensors.torch import load_file

    options = (*SMALL, "--model.tie_embeddings", "--train.optimizer", "adamw", "--train.lr", "0.003")
    theirs, _ = runs("tied-alone", *options, *ALONE)
    ours, _ = runs("tied", *options, *FSDP, processes=2)
    samples = [[line for line in out.splitlines() if line.startswith("  sample")] for out in (ours, theirs)]
    assert samples[0] == samples[1]
    assert len(samples[0]) == 6  # of three prompts, twice
    assert runs.losses("tied") == pytest.approx(runs.losses("tied-alone"), rel=1e-6)  # nothing here is in bf16
    divided, whole = (load_file(runs.checkpoint(name, 12) / "model.safetensors") for name in ("tied", "tied-alone"))
    assert "head.weight" not in divided
    assert all((divided[name] - whole[name]).abs().max() < 1e-4 for name in whole)


def test_dividing_among_one_process_is_refused_in_one_line(runs: Runs) -> None:
    _, err = runs("single", *SMALL, *ALONE, *FSDP, code=2)
    assert "--num_processes" in err
    assert err.strip().count("\n") == 0
    assert not (runs.folder / "single").exists()


@pytest.mark.slow
def test_a_divided_run_compiles_each_block_and_learns_like_one_process(runs: Runs, alone: str) -> None:
    command = [part for part in runs.command("compiled", *SMALL, *FSDP, processes=2) if part != "--train.no_compile"]
    environment = os.environ | {"TORCH_LOGS": "recompiles"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=400, env=environment)
    assert done.returncode == 0, done.stderr
    assert "compile   on" in done.stdout
    assert "Recompiling" not in done.stderr  # a block's code is that of all
    assert runs.losses("compiled") == pytest.approx(runs.losses("alone"), rel=0.02)
