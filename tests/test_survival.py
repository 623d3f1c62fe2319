"""What a run survives: hangs, spikes, too little memory, changed data; and starting from another run's weights."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from checkpoint import Checkpoint, CheckpointError, DiskError, _remove_old, open_run
from errors import explain
from metrics import MetricsFile, read_metrics
from runtime import newest_for_all
from tests.test_train import ROOT, Runs, seal_again, weights


def children_of(process: subprocess.Popen[str]) -> list[int]:
    return [int(n) for n in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]


def wait_for(process: subprocess.Popen[str], path: Path) -> None:
    deadline = time.monotonic() + 120
    while not path.exists():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.05)


def steps_of(folder: Path) -> list[int]:
    return sorted(int(path.name[5:]) for path in folder.glob("step-*"))


# ---- checkpoints kept -------------------------------------------------------------------------------


def test_every_nth_checkpoint_is_kept_beside_the_newest_and_the_best(runs: Runs) -> None:
    runs("kept", "--train.save_every", "2", "--train.keep_checkpoints", "1", "--train.keep_every", "6")
    best = min(
        (r for r in runs.records("kept") if r["kind"] == "validation"), key=lambda r: r["datasets"]["all"]["loss"]
    )
    assert steps_of(runs.folder / "kept") == sorted({6, 12, 18, 20, best["step"]})


def test_a_save_over_an_older_one_that_was_killed_between_its_renames_loses_neither(runs: Runs, whole: str) -> None:
    """As after a spike, which is saved at the step that was gone back to."""
    folder = runs.folder / "killed-between"
    shutil.copytree(runs.folder / "whole", folder)
    (folder / "step-00000020").rename(folder / ".tmp-replaced-step-00000020")
    before = weights(folder / ".tmp-replaced-step-00000020")
    open_run(folder).close()
    assert steps_of(folder) == [10, 20]
    assert weights(folder / "step-00000020") == before
    (folder / "step-00000020").rename(folder / ".tmp-replaced-step-00000010")  # of a save that was done but for this
    open_run(folder).close()
    assert steps_of(folder) == [10]
    assert weights(folder / "step-00000010") == weights(runs.checkpoint("whole", 10))


def test_an_old_checkpoint_that_the_disk_does_not_let_go_waits_for_the_next_save(runs: Runs, whole: str) -> None:
    """As NFS does with files that somebody reads; here something is mounted in it."""
    folder = runs.folder / "held"
    shutil.copytree(runs.folder / "whole", folder)
    held = folder / "step-00000010/held"
    held.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "tmpfs", str(held)], capture_output=True).returncode:
        pytest.skip("nothing can be mounted here")
    held = folder / ".tmp-old-step-00000010/held"
    try:
        _remove_old(folder, 1, 0)
        assert (held.is_mount(), steps_of(folder)) == (True, [20])
    finally:
        subprocess.run(["umount", str(held)], check=True)
    _remove_old(folder, 1, 0)
    assert not held.parent.exists()


def test_a_disk_that_has_no_locks_is_not_taken_for_a_run_that_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def flock(*_: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr("fcntl.flock", flock)
    with pytest.raises(
        DiskError, match=r"cannot write to .*run \(No locks available\); choose another --train.out_dir"
    ):
        open_run(tmp_path / "run")


def test_a_checkpoint_that_a_shared_disk_shows_late_is_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "step-00000005"
    accelerator: Any = SimpleNamespace(wait_for_everyone=lambda: None, process_index=1)
    monkeypatch.setattr("runtime.newest_checkpoint", lambda _: Checkpoint(folder, 5, None))  # as the first process sees
    monkeypatch.setattr("runtime.SECONDS_TO_SEE", 0)
    with pytest.raises(CheckpointError, match="process 1 does not see the checkpoint of step 5"):
        newest_for_all(accelerator, tmp_path)
    monkeypatch.setattr("runtime.SECONDS_TO_SEE", 60)
    monkeypatch.setattr("time.sleep", lambda _: folder.mkdir())
    found = newest_for_all(accelerator, tmp_path)
    assert found is not None
    assert (found.step, found.path) == (5, folder)


def test_metrics_that_cannot_be_written_name_their_file_and_leave_whole_lines(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    log, limit = MetricsFile(path, 0), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (150, limit[1]))
    try:
        log.write("train", 0)
        log.write("train", 1)
        with pytest.raises(OSError, match="File too large") as error:
            log.write("train", 2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert explain(error.value) == (
        f"{path}: File too large; free some space, or choose a place that can be written",
        6,
    )
    assert [r["step"] for r in read_metrics(path)] == [0, 1]
    path.unlink()
    log.write("train", 3)
    assert [r["step"] for r in read_metrics(path)] == [3]


def test_a_run_whose_folder_was_removed_saves_nothing_into_the_one_that_has_begun_there(runs: Runs) -> None:
    first = runs.start("twice", "--train.max_steps", "100000", "--train.save_every", "100000")
    wait_for(first, runs.folder / "twice/loss.png")  # not in the middle of a save
    first.send_signal(signal.SIGSTOP)
    shutil.rmtree(runs.folder / "twice")
    second = runs.start(
        "twice", "--train.max_steps", "100000", "--train.save_every", "1", "--train.keep_checkpoints", "99999"
    )
    try:
        wait_for(second, runs.checkpoint("twice", 1))
        first.send_signal(signal.SIGCONT)
        _, error = first.communicate(timeout=60)
    finally:
        second.terminate()
        second.communicate(timeout=60)
    assert re.fullmatch(rf"error: .*twice was removed, and process {second.pid} has begun another there\n", error)
    assert first.returncode == 2
    steps = steps_of(runs.folder / "twice")
    assert steps == list(range(1, len(steps) + 1))
    status = json.loads((runs.folder / "twice/status.json").read_text())
    assert (status["outcome"], status["process"]) == ("stopped", second.pid)


# ---- another run's weights, other data --------------------------------------------------------------


def test_a_new_run_begins_with_the_weights_and_tokenizer_of_another(runs: Runs, whole: str, tmp_path: Path) -> None:
    parent, held_out = runs.checkpoint("whole", 20), {}
    text = tmp_path / "own.txt"
    text.write_text("\n\n".join(f"The state of document {i} is good, said the president." for i in range(400)))
    data = ["--data.current_datasets", "LOCAL", "--data.dataset_probabilities", "1", "--data.local_files", str(text)]
    out, _ = runs("child", "--init_from", str(parent.parent), *data, "--train.max_steps", "12")
    assert f"weights   of {parent.parent}" in out
    child = runs.checkpoint("child", 12)
    assert json.loads((child / "tokenizer.json").read_text()) == json.loads((parent / "tokenizer.json").read_text())
    for run, step in (("whole", 20), ("child", 12)):  # before and after, on the same documents
        evals = [sys.executable, str(ROOT / "evals.py"), str(runs.folder / run), "--held_out_of"]
        command = [*evals, str(runs.folder / "child"), "--sample_tokens", "1"]
        command += ["--compare", str(runs.folder / "whole")] if run == "child" else []
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        assert "may have been trained on" not in done.stderr
        name = f"{run}/eval-{step:08d}{'' if run == 'child' else '-child'}.json"  # its own are under its own name
        held_out[run] = json.loads((runs.folder / name).read_text())["held_out"]["LOCAL"]
    line = re.search(r"^LOCAL bits/byte +(\d\.\d+) +(\d\.\d+) +\+(\d\.\d+) ", done.stdout, re.MULTILINE)
    assert line, done.stdout
    this, other, difference = map(float, line.groups())
    assert this == pytest.approx(held_out["child"]["bits_per_byte"], abs=1e-3)
    assert difference == pytest.approx(other - this, abs=2e-4)
    last = [r for r in runs.records("child") if r["kind"] == "validation"][-1]
    assert held_out["child"]["loss"] == pytest.approx(last["datasets"]["LOCAL"]["loss"], rel=2e-3)
    assert held_out["child"]["tokens"] == held_out["whole"]["tokens"]
    assert held_out["child"]["loss"] < held_out["whole"]["loss"]
    losses = runs.losses("child")
    assert losses[0] < runs.losses("whole")[0] - 1  # it knows some English
    assert losses[-1] < losses[0]

    parent_bytes = weights(parent)
    text.unlink()  # what it began from may go, as may the text when nothing is left to do
    text.write_text("\n\n".join(f"The state of document {i} is good, said the president." for i in range(400)))
    out, _ = runs("child", "--init_from", "gone", *data, "--train.max_steps", "14", "--resume")
    assert "step 12 to 14" in out
    assert weights(parent) == parent_bytes


def test_the_first_step_from_anothers_weights_has_that_models_loss(runs: Runs, whole: str) -> None:
    runs("same-data", "--init_from", str(runs.checkpoint("whole", 10)), "--train.max_steps", "10")
    fresh, inherited = runs.losses("whole"), runs.losses("same-data")
    assert abs(inherited[0] - fresh[10]) < abs(inherited[0] - fresh[0]) / 2  # batches differ


@pytest.mark.parametrize(
    ("options", "code", "says"),
    [
        (["--init_from", "{folder}/nowhere"], 4, "is not there; give the folder of a run"),
        (["--init_from", "{folder}/whole", "--model.d_model", "96"], 2, "leave the --model options out"),
    ],
)
def test_weights_that_cannot_be_taken_over_are_refused(
    runs: Runs, whole: str, options: list[str], code: int, says: str
) -> None:
    options = [option.format(folder=runs.folder) for option in options]
    _, err = runs("refused", *options, code=code)
    assert says in err
    assert err.count("\n") == 1, err


def test_a_run_goes_on_with_other_data_only_when_told_to_and_only_once(runs: Runs, whole: str) -> None:
    runs("turning", "--train.max_steps", "10")
    other = ["--data.dataset_probabilities", "0.9", "0.1", "--resume"]
    _, err = runs("turning", *other, code=4)
    assert "data.dataset_probabilities (0.5, 0.5) -> (0.9, 0.1)" in err
    assert "--restart_data" in err

    out, _ = runs("turning", *other, "--restart_data", "--train.max_steps", "20")
    assert "its documents begin anew" in out
    assert "SOTU 90" in out.rpartition("mix so far")[2]
    assert [r["step"] for r in runs.records("turning") if r["kind"] == "train"] == list(range(1, 21))
    out, _ = runs("turning", *other, "--restart_data", "--train.max_steps", "22")  # as start.sh repeats it
    assert "begin anew" not in out
    state = runs.checkpoint("turning", 22) / "state.json"  # as of code that divided files otherwise
    state.write_text(state.read_text().replace('"format": 3', '"format": 1'))
    seal_again(state.parent)
    for again in ((), ("--restart_data",)):
        out, _ = runs("turning", *other, *again, "--train.max_steps", "22")
        assert "complete at step 22; nothing to do" in out
        assert "begin anew" not in out
    _, err = runs("turning", *other, "--train.max_steps", "24", code=3)
    assert "the code's order of documents changed" in err
    out, _ = runs("turning", *other, "--restart_data", "--train.max_steps", "24")
    assert "its documents begin anew" in out
    other += ["--restart_data", "--train.max_steps", "24", "--data.bpe_vocab_size", "600"]
    _, err = runs("turning", *other, code=4)
    assert "data.bpe_vocab_size 512 -> 600" in err
    _, err = runs("turning", *other[-4:], "--resume", code=4)
    assert "restart_data" not in err  # which would not help


# ---- hangs ------------------------------------------------------------------------------------------


@pytest.mark.slow  # the launcher waits half a minute for the process that does not answer
def test_a_run_that_hangs_ends_by_itself_and_shows_where(runs: Runs) -> None:
    """One of two processes stops; the other waits for it in an exchange, and no error would ever come."""
    options = ["--train.max_steps", "100000", "--train.save_every", "5", "--train.hang_minutes", "0.05"]
    process = runs.start("hanging", *options, processes=2)
    wait_for(process, runs.checkpoint("hanging", 5))
    stopped = children_of(process)[1]
    os.kill(stopped, signal.SIGSTOP)
    began = time.monotonic()
    try:
        _, err = process.communicate(timeout=150)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(stopped, signal.SIGKILL)
    assert time.monotonic() - began < 120
    assert "Timeout (0:00:03)!" in err
    assert 'train.py", line' in err
    assert process.returncode
    assert steps_of(runs.folder / "hanging")


# ---- numbers that go wrong --------------------------------------------------------------------------


def with_garbage(path: Path) -> list[str]:
    """Simple text, and one document of random characters somewhere in it; the options to train on it."""
    rng = random.Random(0)
    words = "one two three four five six seven eight nine ten".split()
    texts = [" ".join(rng.choices(words, k=120)) for _ in range(600)]
    texts[200] = "".join(rng.choices("ABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789!?;:", k=500))
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return [
        "--data.current_datasets", "LOCAL", "--data.dataset_probabilities", "1", "--data.local_files", str(path),
        "--data.bpe_vocab_size", "300", "--train.max_steps", "120", "--train.save_every", "10", "--train.lr", "0.003",
    ]  # fmt: skip


def test_a_spike_is_undone_and_the_documents_before_it_are_left_out(runs: Runs, tmp_path: Path) -> None:
    options = [*with_garbage(tmp_path / "text.jsonl"), "--train.max_spike", "0.4"]
    out, _ = runs("spiking", *options)
    undone = [r for r in runs.records("spiking") if r["kind"] == "undone"]
    assert undone, out
    assert all(r["loss"] > r["usual_loss"] + 0.4 for r in undone)
    assert out.count("  undone ") >= len(undone)
    trained = [r for r in runs.records("spiking") if r["kind"] == "train"]
    assert [r["step"] for r in trained] == list(range(1, 121))  # each once
    assert max(r["loss"] for r in trained[20:]) < undone[0]["loss"]

    # A run that is interrupted after the spike goes on behind it as well.
    process = runs.start("interrupted", *options)
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("  undone"):
            process.send_signal(signal.SIGTERM)
            break
    process.communicate(timeout=60)
    assert process.returncode == 75
    runs("interrupted", *options, "--resume")
    assert weights(runs.checkpoint("interrupted", 120)) == weights(runs.checkpoint("spiking", 120))


def test_what_is_trained_after_a_spike_led_back_past_a_damaged_checkpoint_is_saved(runs: Runs, tmp_path: Path) -> None:
    options = [*with_garbage(tmp_path / "text.jsonl"), "--train.max_spike", "0.4", "--train.save_every", "5"]
    runs("far-back", *options, "--train.max_steps", "10")
    process = runs.start("far-back", *options, "--train.save_every", "50", "--resume")
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("run "):  # step 10 is loaded; the spike is in the next
            process.send_signal(signal.SIGSTOP)
            os.truncate(runs.checkpoint("far-back", 10) / "model.safetensors", 1000)
            process.send_signal(signal.SIGCONT)
        if line.startswith("  undone"):
            assert "back to step 5" in line
        if re.match(r"step +6/", line):
            process.send_signal(signal.SIGTERM)
            break
    out, err = process.communicate(timeout=60)
    assert process.returncode == 75, out + err
    status = json.loads((runs.folder / "far-back/status.json").read_text())
    assert steps_of(runs.folder / "far-back")[-1] == status["step"] >= 6


def test_two_processes_undo_a_spike_together(runs: Runs, tmp_path: Path) -> None:
    options = [*with_garbage(tmp_path / "text.jsonl"), "--train.max_spike", "0.3", "--train.max_steps", "200"]
    out, _ = runs("spiking-2", *options, processes=2)  # in their second pass: in the first it comes too early
    assert out.count("  undone ")
    assert [r["step"] for r in runs.records("spiking-2") if r["kind"] == "train"] == list(range(1, 201))


def test_spikes_that_other_documents_do_not_end_stop_the_run(runs: Runs) -> None:
    options = ["--train.max_spike", "1e-6", "--train.save_every", "1", "--train.max_steps", "200", "--train.lr", "1e-9"]
    _, err = runs("restless", *options, "--train.save_every", "10", code=5)
    assert "the fourth spike since the checkpoint of step" in err


def test_a_step_that_is_not_finite_names_its_documents(runs: Runs) -> None:
    options = ("--train.lr", "1e30", "--train.max_grad_norm", "0", "--train.warmup_tokens", "0")
    _, err = runs("broken", *options, "--data.seed", "5", code=5)
    table = json.loads((runs.folder / "broken" / "non-finite.json").read_text())
    assert len(table["rows"]) == 4
    assert {row["dataset"] for row in table["rows"]} <= {"SOTU", "WIKI"}
    assert all(row["text"] for row in table["rows"])
    assert repr(table["rows"][0]["text"][:60]) in err or " ".join(table["rows"][0]["text"][:60].split())[:20] in err
    losses = [row["loss"] for row in table["rows"]]
    broken = [loss for loss in losses if loss is None]
    assert losses == broken + sorted((loss for loss in losses if loss is not None), reverse=True)  # the worst first


# ---- too little memory ------------------------------------------------------------------------------

LIMITED = """
import os, resource, sys
limit = int(os.environ.get("LIMIT_MB_OF_RANK_" + os.environ.get("RANK", "0"), "-1"))
sys.argv[:] = sys.argv[1:]
sys.path.insert(0, os.path.dirname(sys.argv[0]))
import runtime, train
from errors import exit_code_of
name = os.environ["LIMITED"]
tried = getattr(runtime, name)

def limited(*arguments, **more):
    now = next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmSize"))
    unlimited = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (now * 1024 + limit * 2**20, unlimited[1]))
    try:
        return tried(*arguments, **more)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, unlimited)

if limit >= 0:
    setattr(runtime, name, limited)
raise SystemExit(exit_code_of(train.main))
"""


def run_limited(
    runs: Runs, script: Path, what: str, n_mb: int, name: str, *options: str, processes: int
) -> subprocess.CompletedProcess[str]:
    """The limit is the kernel's, on what the last process may map in this function of runtime.py."""
    script.write_text(LIMITED)
    command = runs.command(name, *options, processes=processes)
    command.insert(command.index(str(ROOT / "train.py")), str(script))
    limit = {"OMP_NUM_THREADS": "1", "LIMITED": what, f"LIMIT_MB_OF_RANK_{processes - 1}": str(n_mb)}
    limit["MALLOC_MMAP_THRESHOLD_"] = "65536"  # what was freed before is no way round it
    return subprocess.run(command, env=os.environ | limit, capture_output=True, text=True, timeout=240)


@pytest.mark.parametrize("processes", [1, 2])
def test_too_little_memory_means_a_smaller_micro_batch_and_the_same_tokens_per_step(
    runs: Runs, tmp_path: Path, processes: int
) -> None:
    """All take the micro-batch of the process that has the least."""
    name = f"limited-{processes}"
    options = [
        "--model.max_length",
        "512",
        "--train.batch_size",
        "64",
        "--data.n_streams",
        "16",
        "--train.max_steps",
        "2",
    ]
    options += ["--train.gradient_accumulation_steps", str(2 // processes)]
    done = run_limited(runs, tmp_path / "limited.py", "runs_out_of_memory", 500, name, *options, processes=processes)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "memory    too little for that; now " in done.stdout
    trained = [r for r in runs.records(name) if r["kind"] == "train"]
    assert [r["tokens"] for r in trained] == [128 * 512, 2 * 128 * 512]
    config = json.loads((runs.folder / name / "config.json").read_text())["train"]
    assert config["batch_size"] < 64
    assert config["batch_size"] * config["gradient_accumulation_steps"] * processes == 128


def test_a_step_that_is_not_finite_is_called_so_although_its_rows_are_too_large_to_score(
    runs: Runs, tmp_path: Path
) -> None:
    options = ["--train.lr", "1e30", "--train.max_grad_norm", "0", "--train.warmup_tokens", "0", "--data.seed", "5"]
    options += ["--model.max_length", "4096", "--train.batch_size", "2"]  # logits are 4 MB, and 8 in fp32
    done = run_limited(runs, tmp_path / "limited.py", "score_rows", 1, "full", *options, processes=2)
    assert "Its 4 rows could not be scored one by one: " in done.stderr, done.stderr
    status = json.loads((runs.folder / "full/status.json").read_text())
    assert (status["exit_code"], "could not be scored" in status["error"]) == (5, True)
    rows = json.loads((runs.folder / "full/non-finite.json").read_text())["rows"]
    assert [row["process"] for row in rows] == [0, 0, 1, 1]
    assert all(row["text"] for row in rows)
    assert [row["loss"] for row in rows[2:]] == [None, None]
