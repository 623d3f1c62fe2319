"""What a run survives, tried for real:  python bench/faults.py [--quick] [PROOF ...]

    saves    SIGKILL in the middle of saves: none that had returned is lost, retention keeps the newest and the best
    kills    SIGKILL of training, from start-up to saves, 1 and 2 processes: the same bits as uninterrupted
    order    strace of a save: what is on the disk before a checkpoint gets its name, and before an old one goes
    flips    a flipped bit in each file of a checkpoint: refused; --resume uses the one before, to the same bits
    disk     a disk that fills up during a save: exit code 6, older checkpoints intact, then on to the same bits
    signals  SIGTERM to one of two processes, and to the launcher: both stop at one step; then the same bits
    worlds   1, then 2, then 1 processes: the same place in the documents as one process throughout
    stall    how long a save of 124M parameters keeps training waiting, as a share of half an hour
    harm     planted pickles and odd JSON are refused and nothing in them runs; HF_TOKEN shows up nowhere

The processes, disks and signals are real. Prints a table and writes results/reliability/faults.json.
--quick tries less of each, and writes nothing.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import json
import os
import pickle
import random
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import textwrap
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import psutil
import torch

from bench.context import context
from checkpoint import (
    CheckpointError,
    gather_tensors,
    list_checkpoints,
    load_model,
    open_run,
    read_state,
    save_checkpoint,
    verify_checkpoint,
)
from config import PRESETS
from files import write_json
from model import GPT
from optim import build_optimizers
from tests.conftest import GETTYSBURG
from tests.loopback_hub import Fault, Hub, make_fineweb_and_c4
from tests.test_bad_inputs import CONFIG, STATE, Planted, edit, seal, tensors_of
from tests.test_train import ROOT, Runs, weights
from tokenizer import train_bpe

FILES = ["config.json", "model.safetensors", "optimizer.safetensors", "state.json", "tokenizer.json"]
Proof = tuple[str, dict[str, Any]]  # what was seen, and the figures


class Skipped(Exception):
    """This machine cannot show it."""


class Process(subprocess.Popen[bytes]):
    """A program, what it prints, and the processes below it."""

    started: ClassVar[list[Process]] = []

    def __init__(self, folder: Path, command: list[str], **environment: str):
        self.log = Path(tempfile.mkstemp(".txt", "log-", folder)[1])
        with self.log.open("wb") as out:
            environment = os.environ | {"OMP_NUM_THREADS": "1"} | environment
            super().__init__(command, stdout=out, stderr=subprocess.STDOUT, env=environment)
        self.started.append(self)

    def text(self) -> str:
        return self.log.read_text(errors="replace")

    def step(self) -> int:
        """The last step of training that it printed."""
        return max([0, *map(int, re.findall(r"^step +(\d+)/", self.text(), re.MULTILINE))])

    def family(self) -> list[psutil.Process]:
        """It and those below it; none when it has ended."""
        with contextlib.suppress(psutil.NoSuchProcess):
            me = psutil.Process(self.pid)
            return [me, *me.children(recursive=True)]
        return []

    def ranks(self) -> list[psutil.Process]:
        """The training processes, by rank; none if there is no launcher."""
        found = {}
        for process in self.family():
            with contextlib.suppress(psutil.Error):
                found[process.environ().get("RANK")] = process
        found.pop(None, None)  # the launcher
        return [found[rank] for rank in sorted(found)]

    def end(self, *processes: psutil.Process) -> None:
        """SIGKILL to these processes; without any, to all. Returns when the first one is gone."""
        for process in processes or (self.family() if self.poll() is None else ()):
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        self.wait(timeout=300)

    def wait_for(self, sight: Callable[[], Any]) -> None:
        deadline = time.monotonic() + 300
        while not sight():
            assert self.poll() is None, f"ended too early: {self.text()}"
            assert time.monotonic() < deadline, f"nothing happens: {self.text()}"
            time.sleep(0.002)


class Place(Runs):
    """A folder for one proof, with runs of the preset smoke that save and validate often.

    shared: a folder for what several proofs use: the cache of the data, and runs that nothing happens to.
    """

    def __init__(self, folder: Path, shared: Path):
        super().__init__(folder, shared / "cache")
        self.shared = shared

    def train(self, name: str, steps: int, *options: str, processes: int = 1) -> list[str]:
        """The command; each number of processes trains on the same rows per step."""
        every = ("--train.save_every", "5", "--train.eval_every", "20", "--train.batch_size", str(4 // processes))
        return self.command(name, "--train.max_steps", str(steps), *every, *options, "--resume", processes=processes)

    def finish(self, command: list[str], code: int = 0) -> str:
        process = Process(self.folder, command)
        assert process.wait(timeout=300) == code, process.text()
        return process.text()

    def whole(self, steps: int, processes: int = 1) -> str:
        """The name, in this folder, of a run that nothing happens to."""
        name = f"whole-{steps}-{processes}"
        if not (self.shared / name).exists():
            self.finish(self.train(name, steps, "--train.out_dir", str(self.shared), processes=processes))
        if not (self.folder / name).exists():
            (self.folder / name).symlink_to(self.shared / name)
            assert len(self.losses(name)) == steps
        return name

    def finish_like_whole(self, name: str, steps: int, processes: int = 1) -> str:
        """Resume a run to its end: each step was logged once, with the uninterrupted run's loss; the same weights."""
        text, whole = self.finish(self.train(name, steps, processes=processes)), self.whole(steps, processes)
        assert self.losses(name) == self.losses(whole), f"{name}: other losses"
        same = weights(self.checkpoint(name, steps)) == weights(self.checkpoint(whole, steps))
        assert same, f"{name}: other weights"
        return text

    def stop(self, name: str, steps: int, at: int, target: str, processes: int) -> int:
        """Train until a step, then SIGTERM; returns the step at which all processes stopped and saved."""
        process = Process(self.folder, self.train(name, steps, processes=processes))
        process.wait_for(lambda: process.step() >= at)
        ranks = process.ranks()
        (ranks[-1] if ranks and target != "launcher" else process).terminate()
        process.wait(timeout=300)
        status = json.loads((self.folder / name / "status.json").read_text())
        assert (status["outcome"], status["exit_code"]) == ("stopped", 75), f"{status}: {process.text()}"
        streams = read_state(self.checkpoint(name, status["step"]))["data"]["streams"]  # of all processes
        rows = [sum(source[-2] for source in stream) for stream in streams.values()]  # each step takes one of each
        assert rows == 4 * [status["step"]] != 4 * [steps], f"stopped at different steps, or too late: {rows}"
        return int(status["step"])


@functools.cache
def parts() -> Any:
    """What a small checkpoint is made of: tensors and a tokenizer."""
    torch.set_num_threads(1)
    return tensors_of(GPT(CONFIG.model.resolved(300))), train_bpe([GETTYSBURG], 300)


def save_small(run: Path, step: int, val_loss: float | None, keep: int = 3) -> None:
    tensors, tokenizer = parts()
    config = dataclasses.replace(CONFIG, train=dataclasses.replace(CONFIG.train, keep_checkpoints=keep))
    save_checkpoint(run, step, tensors, {**STATE, "step": step}, config, tokenizer, val_loss)


def saves(place: Place, quick: bool) -> Proof:
    parts()  # before the processes begin, which are forks of this one
    run, chance = place.folder / "run", random.Random(0)
    returned: dict[int, float] = {}  # step -> validation loss of the saves that returned
    n, kills, interrupted, removing = 8 if quick else 150, 0, 0, 0

    def save_for_ever(pipe: int) -> None:
        lock = open_run(run)
        step = max([0, *(c.step for c in list_checkpoints(run))])
        while lock:
            step += 1
            val_loss = float(step * 7919 % 1009)  # now and then the best so far
            save_small(run, step, val_loss)
            os.write(pipe, f"{step} {val_loss}\n".encode())

    while interrupted < n:
        reader, writer = os.pipe()
        if (pid := os.fork()) == 0:
            try:
                save_for_ever(writer)
            finally:
                os._exit(1)
        os.close(writer)
        time.sleep(chance.uniform(0, 0.4))
        os.kill(pid, signal.SIGKILL)
        assert os.WIFSIGNALED(os.waitpid(pid, 0)[1]), "the process failed by itself"
        with os.fdopen(reader) as pipe:
            returned |= {int(line.split()[0]): float(line.split()[1]) for line in pipe}
        kills, removing = kills + 1, removing + any(run.glob(".tmp-old-*"))
        interrupted += any(run.glob(".tmp-*"))
        found = list_checkpoints(run)
        for checkpoint in found:
            verify_checkpoint(checkpoint.path)
        if returned:
            assert load_model(run)[3] == found[-1].step >= max(returned), "a save that had returned is lost"
            assert min(c.val_loss for c in found) <= min(returned.values()), "the best is removed"
            assert len(found) >= min(len(returned), 3), "retention removed too many"
    said = f"{kills} SIGKILLs, {interrupted} in a save, {removing} of these while it removed an old checkpoint"
    return f"{said}; {len(returned):,} saves had returned: none is lost, the best is there, all are sound", {
        "SIGKILLs": kills, "in a save": interrupted, "while an old one was removed": removing,
        "saves that returned": len(returned),
    }  # fmt: skip


def kills(place: Place, quick: bool) -> Proof:
    phases: Counter[str] = Counter()
    for processes, n in ((1, 2),) if quick else ((1, 20), (2, 10)):
        steps, name, reached, chance = 30 * n, f"killed-{processes}", 0, random.Random(processes)
        unfinished = (place.folder / name).glob
        for i in range(n):
            process = Process(place.folder, place.train(name, steps, processes=processes))
            if i % 4 == 1:
                time.sleep(chance.uniform(0, 4))
            else:
                goal = reached + chance.randint(1, 15)
                process.wait_for(lambda process=process, goal=goal: process.step() >= goal)
                if i % 4 == 2:
                    process.wait_for(lambda unfinished=unfinished: any(unfinished(".tmp-step-*")))
                else:
                    time.sleep(chance.uniform(0, 0.1))
            ranks = process.ranks()  # now and then one of two is killed, and the launcher ends the other
            process.end(*([chance.choice(ranks)] if len(ranks) == 2 and i % 3 == 2 else []))
            assert process.returncode, "it was faster than the kill; this shows nothing"
            step, last = process.step(), process.text().rstrip().rpartition("\n")[2]
            validating = last.startswith("  held") or (last.startswith("step") and step % 20 == 0)
            phase = "start-up" if step == 0 else "validation" if validating else "training"
            phases["a save" if any(unfinished(".tmp-step-*")) else phase] += 1
            reached = max(reached, step)
        place.finish_like_whole(name, steps, processes)
    seen = ", ".join(f"{count} in {phase}" for phase, count in phases.most_common())
    total = sum(phases.values())
    return f"{total} SIGKILLs ({seen}), each resumed: losses of every step and final weights equal to the bit", {
        "SIGKILLs": total, "where": dict(phases),
    }  # fmt: skip


def order(place: Place, quick: bool) -> Proof:
    if not shutil.which("strace"):
        raise Skipped("strace is not installed (apt install strace)")
    trace, calls = place.folder / "trace", "trace=fsync,fdatasync,rename,renameat,renameat2"
    command = ["strace", "-f", "-y", "-o", str(trace), "-e", calls, sys.executable, __file__, "--save"]
    process = Process(place.folder, [*command, str(place.folder / "run")])
    if process.wait(timeout=300):
        raise Skipped(f"strace does not work here: {process.text()[-200:]}")
    events: list[str] = []
    for line in trace.read_text().replace(f"{place.folder}/", "").splitlines():
        if match := re.search(
            r'(sync|rename)\w*\((?:\d+<(.+)>|(?:AT_FDCWD\S* )?"(.+?)", (?:AT_FDCWD\S* )?"(.+?)").*= 0', line
        ):
            events.append(" ".join(filter(None, match.groups())))
    new = "run/.tmp-step-00000002"
    files = [events.index(f"sync {new}/{name}") for name in FILES]  # a ValueError when it is not there
    manifest = next(i for i, event in enumerate(events) if event.startswith(f"sync {new}/.tmp-manifest.json"))
    named = events.index(f"rename {new} run/step-00000002")
    parent = events.index("sync run", named)
    removed = events.index("rename run/step-00000001 run/.tmp-old-step-00000001")
    assert max(files) < manifest < events.index(f"sync {new}") < named < parent < removed, events
    said = "5 files are flushed, then the manifest and the folder; then the rename, and the run's folder is flushed"
    return f"{said}; only then an old checkpoint goes", {"system calls": events[min(files) :]}


def save_two(run: Path) -> None:
    """What strace looks at: two saves, the second of which makes the first superfluous."""
    with open_run(run):
        for step in (1, 2):
            save_small(run, step, None, keep=1)


def flips(place: Place, quick: bool) -> Proof:
    chance, files = random.Random(0), FILES[2:3] if quick else ["manifest.json", *FILES]
    for file in files:
        shutil.copytree(place.folder / place.whole(60), place.folder / file)
        path = place.checkpoint(file, 60) / file
        content = bytearray(path.read_bytes())
        content[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
        path.write_bytes(content)
        with contextlib.suppress(CheckpointError):
            load_model(path.parent)
            raise AssertionError(f"a flipped bit in {file} is not noticed")
        text = place.finish_like_whole(file, 60)
        assert "damaged-step-00000060, and the checkpoint before it is used" in text, text
        assert "step 55 to 60" in text, text
    return f"a bit in each of {len(files)} files: noticed, put aside, the run ended with the same bits", {
        "files": files
    }


def disk(place: Place, quick: bool) -> Proof:
    small, steps = place.folder / "small disk", 60 if quick else 120
    small.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", str(small)]
    if (done := subprocess.run(mount, capture_output=True, text=True)).returncode:
        raise Skipped(f"a small disk cannot be mounted here: {done.stderr.strip()}")
    try:
        command = place.train("full", steps, "--train.out_dir", str(small))
        process, run, ballast = Process(place.folder, command), small / "full", small / "ballast"
        process.wait_for(lambda: (run / "step-00000010").exists())
        with ballast.open("wb", buffering=0) as file:
            while process.poll() is None:  # room for its metrics stays, and none for a checkpoint
                if os.statvfs(small).f_bavail * os.statvfs(small).f_frsize > 300_000:
                    file.write(bytes(65536))
        text, status = process.text(), json.loads((run / "status.json").read_text())
        assert (process.returncode, status["outcome"], status["exit_code"]) == (6, "failed", 6), text
        assert "earlier ones are intact" in text, text
        assert "Traceback" not in text, text
        left = list_checkpoints(run)
        for checkpoint in left:
            verify_checkpoint(checkpoint.path)
        assert 10 <= left[-1].step < steps
        ballast.unlink()
        place.finish(command)
        shutil.copytree(run, place.folder / "full")
        place.finish_like_whole("full", steps)
    finally:
        Process.started[-1].end()
        subprocess.run(["umount", str(small)], check=False)
    said = (
        f"64 MB filled up during a save at step {left[-1].step + 5}: exit code 6, {len(left)} older checkpoints intact"
    )
    return f"{said}; with room again on to the same bits", {"checkpoints left": [c.step for c in left]}


def signals(place: Place, quick: bool) -> Proof:
    stopped = {}
    for target in ("one rank",) if quick else ("one rank", "the launcher"):
        name = target.split()[1]
        stopped[target] = place.stop(name, 60, 6, name, processes=2)
        if not quick:
            place.finish_like_whole(name, 60, processes=2)
    said = ", ".join(f"SIGTERM to {target} stopped both at step {step}" for target, step in stopped.items())
    said += " of 60; saved, 75 in status.json"
    return said if quick else f"{said}, resumed to the same bits", {"stopped at": stopped}


def worlds(place: Place, quick: bool) -> Proof:
    turns = ((2, 30),) if quick else ((1, 15), (2, 35))
    stops = {n: place.stop("moved", 60, at, "one rank", processes=n) for n, at in turns}
    place.finish(place.train("moved", 60))
    ends = [read_state(place.checkpoint(name, 60)) for name in ("moved", place.whole(60))]
    assert ends[0]["data"] == ends[1]["data"], "another place in the documents"
    pairs = list(zip(place.losses("moved"), place.losses(place.whole(60)), strict=True))
    apart = max(abs(a - b) / b for a, b in pairs)
    assert apart < 0.02, f"losses {apart:.1%} apart"
    return (
        f"{', '.join(f'{n} to step {step}' for n, step in stops.items())}, 1 to 60 processes: in all 4 "
        f"streams the place of one process throughout, and each loss within {apart:.2%} of its"
    ), {"hand-overs": stops, "largest difference of a loss": apart}


def stall(place: Place, quick: bool) -> Proof:
    config = PRESETS["demo" if quick else "gpt2"]
    config = dataclasses.replace(config, train=dataclasses.replace(config.train, keep_checkpoints=1))
    model, tokenizer, seconds = GPT(config.model.resolved(config.data.n_vocab)), parts()[1], []
    optimizers = build_optimizers(model, config.train)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    for optimizer in optimizers:
        optimizer.step()  # makes its state
    open_run(place.folder / "run").close()
    for step in (1, 2, 3):
        started = time.perf_counter()
        tensors = gather_tensors(model, optimizers, keep=True)
        path = save_checkpoint(place.folder / "run", step, tensors, STATE, config, tokenizer, None)
        seconds.append(round(time.perf_counter() - started, 2))
    megabytes, middle = sum(file.stat().st_size for file in path.iterdir()) / 1e6, statistics.median(seconds)
    n, minutes = model.parameter_counts()["total"] / 1e6, config.train.save_minutes
    return (
        f"{n:.0f}M parameters, {megabytes:,.0f} MB: {middle:.1f} s a save (median of 3), "
        f"{megabytes / middle:,.0f} MB/s; every {minutes:.0f} minutes that is {middle / 60 / minutes:.2%} of the time"
    ), {"MB": round(megabytes, 1), "seconds": seconds, "share": round(middle / 60 / minutes, 5)}


def harm(place: Place, quick: bool) -> Proof:
    marker = place.folder / "planted code ran"
    code = f"__import__('pathlib').Path({str(marker)!r}).touch()"

    def plant(file: Path) -> None:
        file.write_bytes(pickle.dumps(Planted(marker)))
        seal(file.parent)

    forged: dict[str, Callable[[Path], None]] = {
        "model.safetensors": plant,
        "optimizer.safetensors": plant,
        "state.json": lambda file: edit(file, lambda state: {**state, "step": [code], "data": code}),
        "tokenizer.json": lambda file: edit(file, lambda t: {**t, "pattern": code, "special_ids": {code: code}}),
        "config.json": lambda file: edit(file, lambda c: {**c, "train": {**c["train"], "optimizer": code}}),
    }
    starts = 0
    for name in [*forged][: 1 if quick else None]:
        shutil.copytree(place.folder / place.whole(60), place.folder / name)
        forged[name](place.checkpoint(name, 60) / name)
        commands = [place.train(name, 70)]
        if name not in ("optimizer.safetensors", "state.json"):  # which generate.py does not read
            commands.append([sys.executable, str(ROOT / "generate.py"), str(place.folder / name)])
        for command in commands[-1:] if quick else commands:
            text = place.finish(command, code=4)
            assert re.fullmatch(r"(device .*\n)?error: .*\n", text), text
            assert not marker.exists(), f"{name}: it ran"
            starts += 1

    make_fineweb_and_c4(place.folder / "hub", documents=400)
    secret, looks = "hf_" + "".join(random.Random(0).choices("abcdefghijkmnop", k=30)), 0
    data = ["--data.current_datasets", "FINEWEB", "C4", "--data.dataset_probabilities", "0.6", "0.4"]
    home = str(place.folder / "home")
    with Hub(place.folder / "hub") as hub:
        for name, fault in (("served", None),) if quick else (("served", None), ("refused", Fault(403))):
            hub.faults = lambda path, fault=fault: fault
            command = place.train(name, 10, *data, "--data.cache_dir", home, processes=1 if quick else 2)
            process = Process(place.folder, command, HF_ENDPOINT=hub.endpoint, HF_TOKEN=secret, HF_HOME=home)
            while process.poll() is None:
                for each in process.family():
                    with contextlib.suppress(psutil.Error):
                        assert secret not in " ".join(each.cmdline()), "the token is in a command line"
                        looks += 1
                time.sleep(0.02)
            assert bool(process.returncode) == bool(fault), process.text()
    assert any(secret in token for token in hub.tokens), "the token was not used: this shows nothing"
    files = [path for path in place.folder.rglob("*") if path.is_file()]
    assert not [path for path in files if secret.encode() in path.read_bytes()], "the token is in a file"
    return (
        f"{starts} starts on forged checkpoints (pickles, code, odd types): exit code 4, nothing ran; HF_TOKEN in none "
        f"of {looks:,} looks at command lines and {len(files)} files, logs among them"
    ), {"forged": [*forged], "starts": starts, "files searched": len(files)}


PROOFS = {f.__name__: f for f in (saves, kills, order, flips, disk, signals, worlds, stall, harm)}


def main() -> int:
    if sys.argv[1:2] == ["--save"]:
        save_two(Path(sys.argv[2]))
        return 0
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("proofs", nargs="*", metavar="PROOF", help="some of these; without any: all")
    parser.add_argument("--quick", action="store_true", help="less of each; nothing is written")
    arguments = parser.parse_args()
    if unknown := [name for name in arguments.proofs if name not in PROOFS]:
        parser.error(f"no proof is called {unknown[0]}; there are {', '.join(PROOFS)}")
    out = ROOT / "results" / "reliability" / "faults.json"
    results = json.loads(out.read_text()) if out.exists() else {}
    failed = 0
    print(f"{'proof':<9}{'result':<9}{'seconds':>7}  what was seen")
    with tempfile.TemporaryDirectory() as shared:
        for name in arguments.proofs or PROOFS:
            started, figures = time.perf_counter(), {}
            with tempfile.TemporaryDirectory() as folder:
                try:
                    said, figures = PROOFS[name](Place(Path(folder), Path(shared)), arguments.quick)
                    result = "passed"
                except Skipped as reason:
                    said, result = str(reason), "skipped"
                except (AssertionError, ValueError, subprocess.TimeoutExpired) as error:
                    said, result, failed = f"{error!r:.3000}", "FAILED", failed + 1
                finally:
                    for process in Process.started:
                        process.end()
            seconds = round(time.perf_counter() - started, 1)
            indented = textwrap.fill(said, 100, initial_indent=27 * " ", subsequent_indent=27 * " ").lstrip()
            print(f"{name:<9}{result:<9}{seconds:>7}  {indented}", flush=True)
            results[name] = {"result": result, "seconds": seconds, "seen": said, **figures, "context": context()}
            if not arguments.quick:
                write_json(out, results)
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
