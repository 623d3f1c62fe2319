"""Runs as a user starts them: real processes, real files, killed and continued."""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from checkpoint import _digest, newest_checkpoint
from hardware import why_not_compile
from metrics import Meter, MetricsFile, amount, log_line, read_metrics

ROOT = Path(__file__).resolve().parent.parent
FP32 = ("--train.precision", "fp32")


class Runs:
    """Starts train.py --preset smoke in a folder of its own; the tokenizer's cache is shared by the session."""

    def __init__(self, folder: Path, cache: Path):
        self.folder, self._cache = folder, cache

    def command(self, name: str, *options: str, processes: int = 1) -> list[str]:
        launcher = ["-m", "torch.distributed.run", "--nproc_per_node", str(processes)] if processes > 1 else []
        train = [str(ROOT / "train.py"), "--preset", "smoke", "--train.no_compile", "--train.run_name", name]
        places = ["--train.out_dir", str(self.folder), "--data.cache_dir", str(self._cache)]
        return [sys.executable, *launcher, *train, *places, *options]

    def start(self, name: str, *options: str, processes: int = 1) -> subprocess.Popen[str]:
        # One thread each: the runs are tiny, and the same number of threads gives the same bits.
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        pipe = subprocess.PIPE
        command = self.command(name, *options, processes=processes)
        return subprocess.Popen(command, env=environment, stdout=pipe, stderr=pipe, text=True)

    def __call__(self, name: str, *options: str, processes: int = 1, code: int = 0) -> tuple[str, str]:
        process = self.start(name, *options, processes=processes)
        out, err = process.communicate(timeout=240)
        assert process.returncode == code, out + err
        return out, err

    def losses(self, name: str) -> list[float]:
        records = self.records(name)
        return [r["loss"] for r in records if r["kind"] == "train"]

    def records(self, name: str) -> list[dict]:
        return [json.loads(line) for line in (self.folder / name / "metrics.jsonl").read_text().splitlines()]

    def checkpoint(self, name: str, step: int) -> Path:
        return self.folder / name / f"step-{step:08d}"


def weights(path: Path) -> bytes:
    return (path / "model.safetensors").read_bytes() + (path / "optimizer.safetensors").read_bytes()


def assert_same_training(runs: Runs, one: str, other: str) -> None:
    """The same mathematics up to rounding, which the bf16 orthogonalisation of Muon amplifies as training goes on."""
    ours, theirs = ([r for r in runs.records(name) if r["kind"] == "train"] for name in (one, other))
    assert ours[0]["loss"] == pytest.approx(theirs[0]["loss"], rel=1e-6)
    assert ours[0]["grad_norm"] == pytest.approx(theirs[0]["grad_norm"], rel=1e-4)  # optimizers hide a wrong scale
    assert [r["loss"] for r in ours] == pytest.approx([r["loss"] for r in theirs], rel=2e-3)


def test_a_run_leaves_what_its_help_promises(runs: Runs, whole: str) -> None:
    folder = runs.folder / "whole"
    assert {p.name for p in folder.iterdir()} >= {"config.json", "metrics.jsonl", "loss.png", "status.json"}
    status = json.loads((folder / "status.json").read_text())
    assert (status["outcome"], status["step"]) == ("complete", 20)
    assert (folder / "loss.png").read_bytes()[:4] == b"\x89PNG"
    assert [p.name for p in sorted(folder.glob("step-*"))] == ["step-00000010", "step-00000020"]
    assert "step 20/20 100.0% | loss " in whole
    assert "256 tokens per step" in whole
    for record in (r for r in runs.records("whole") if r["kind"] == "validation"):
        assert [text[:6] for text in record["samples"]] == ["The pe", "In the", "The ci"]


def test_the_loss_falls(runs: Runs, whole: str) -> None:
    losses = runs.losses("whole")
    assert len(losses) == 20
    assert losses[0] == pytest.approx(np.log(512), abs=0.05)  # a fresh model knows nothing
    assert np.mean(losses[-3:]) < losses[0] - 1


def test_the_same_command_gives_the_same_bits(runs: Runs, whole: str) -> None:
    runs("again")
    assert weights(runs.checkpoint("again", 20)) == weights(runs.checkpoint("whole", 20))


def test_train_20_equals_train_11_killed_and_resumed_for_9(runs: Runs, whole: str) -> None:
    process = runs.start("killed", "--train.save_every", "11", "--train.max_steps", "20")
    deadline = time.monotonic() + 120
    while not runs.checkpoint("killed", 11).exists():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.002)
    process.kill()
    process.communicate()
    assert not runs.checkpoint("killed", 20).exists(), "it was faster than the kill; this run shows nothing"
    out, _ = runs("killed", "--train.save_every", "11", "--resume")
    assert "step 11 to 20" in out
    assert weights(runs.checkpoint("killed", 20)) == weights(runs.checkpoint("whole", 20))
    assert runs.losses("killed") == runs.losses("whole")  # each step once, with the same bits
    assert [(r["step"], r["world_size"]) for r in runs.records("killed") if r["kind"] == "start"] == [(0, 1), (11, 1)]


def test_sigterm_saves_and_exits_75_and_resume_gives_the_same_bits(runs: Runs, whole: str) -> None:
    process = runs.start("stopped")
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("step  5/"):
            process.send_signal(signal.SIGTERM)
            break
    out, err = process.communicate(timeout=60)
    assert process.returncode == 75, out + err
    status = json.loads((runs.folder / "stopped" / "status.json").read_text())
    assert status["outcome"] == "stopped"
    assert 5 <= status["step"] < 20
    assert runs.checkpoint("stopped", status["step"]).exists()
    assert (runs.folder / "stopped" / "loss.png").exists()  # though no validation may have come by then
    runs("stopped", "--resume")
    assert weights(runs.checkpoint("stopped", 20)) == weights(runs.checkpoint("whole", 20))


def test_accumulation_equals_one_big_batch(runs: Runs) -> None:
    runs("big", *FP32)
    runs("accumulated", *FP32, "--train.batch_size", "1", "--train.gradient_accumulation_steps", "4")
    assert_same_training(runs, "accumulated", "big")


def test_a_run_says_the_rate_of_its_batch_and_keeps_it_however_the_rows_are_divided(runs: Runs) -> None:
    out, _ = runs("large", "--train.gradient_accumulation_steps", "16", "--train.max_steps", "8")
    assert "lr        0.04 at its peak: 0.02 x (4,096 / 256 tokens per step)^(1/4); another with --train.lr\n" in out
    again = ["--train.batch_size", "32", "--train.gradient_accumulation_steps", "1", "--train.max_steps", "9"]
    out, _ = runs("large", *again, "--resume", processes=2)
    assert "lr        0.04 at its peak" in out
    steps = [r for r in runs.records("large") if r["kind"] == "train"]
    cooled = [0.05 + 0.95 * (total - step) / (0.65 * total) for step, total in [*((i, 8) for i in range(8)), (8, 9)]]
    assert [r["lr"] for r in steps] == pytest.approx([0.04 * min(1, factor) for factor in cooled])
    saved = json.loads((runs.checkpoint("large", 9) / "config.json").read_text())["train"]
    assert (saved["lr"], saved["lr_tokens_per_step"]) == (0.04, 4096)


def test_a_run_of_before_the_rate_followed_the_batch_goes_on_with_its_own(runs: Runs) -> None:
    options = ["--train.gradient_accumulation_steps", "4", "--train.max_steps", "2"]
    runs("older", *options, "--train.lr", "0.02")
    path = runs.checkpoint("older", 2)
    config = json.loads((path / "config.json").read_text())
    del config["train"]["lr_tokens_per_step"]
    (path / "config.json").write_text(json.dumps(config))
    manifest = json.loads((path / "manifest.json").read_text())
    written = (path / "config.json").read_bytes()
    manifest["files"]["config.json"] = {"size": len(written), "sha256": hashlib.sha256(written).hexdigest()}
    manifest["sha256"] = _digest(manifest)
    (path / "manifest.json").write_text(json.dumps(manifest))
    options[-1] = "3"
    _, err = runs("older", *options, "--resume", code=4)
    assert "train.lr 0.02 -> 0.028284271247461905. Use the old values" in err
    runs("older", *options, "--resume", "--train.lr", "0.02")


def test_two_processes_equal_one_and_hand_over_to_one(runs: Runs) -> None:
    if not (runs.folder / "big").exists():
        runs("big", *FP32)
    options = (*FP32, "--train.batch_size", "2", "--train.save_every", "7")
    runs("two", *options, processes=2)
    assert_same_training(runs, "two", "big")
    two, one = ([r["datasets"] for r in runs.records(name) if r["kind"] == "validation"][-1] for name in ("two", "big"))
    for name, score in one.items():
        for key, value in score.items():  # a token may be the fifth likeliest in one and the sixth in the other
            assert two[name][key] == pytest.approx(value, rel=1e-4, abs=1e-3 if "top" in key else 0), key
    # The same rows per step on one device: accumulation makes up for the other one.
    out, _ = runs("two", *options, "--train.max_steps", "22", "--resume")
    assert "2 rows x 2 accumulated x 1 devices" in out
    (lr,) = (r["lr"] for r in runs.records("two") if r["kind"] == "train" and r["step"] == 21)
    assert re.search(rf"schedule  of 22 steps, before of 20: from lr [\d.e-]+ to {lr:.1e} at once\n", out)
    assert runs.records("two")[-1]["tokens"] == 22 * 256


def test_a_finished_run_says_so_and_changes_nothing(runs: Runs, whole: str) -> None:
    before = weights(runs.checkpoint("whole", 20))
    out, _ = runs("whole", "--resume")
    assert "complete at step 20; nothing to do" in out
    assert weights(runs.checkpoint("whole", 20)) == before


def test_a_second_run_in_the_same_folder_is_refused(runs: Runs, whole: str) -> None:
    _, err = runs("whole", code=2)
    assert err.strip().count("\n") == 0
    assert "--resume" in err
    assert "--train.run_name" in err


def test_resume_refuses_another_model_naming_old_and_new(runs: Runs, whole: str) -> None:
    _, err = runs("whole", "--resume", "--model.n_layers", "3", code=4)
    assert "model.n_layers 2 -> 3" in err
    assert "Traceback" not in err


def test_resume_refuses_other_data(runs: Runs, whole: str) -> None:
    _, err = runs("whole", "--resume", "--data.seed", "5", code=4)
    assert "data.seed 1337 -> 5" in err


def test_a_damaged_checkpoint_is_put_aside_and_the_one_before_it_gives_the_same_bits(runs: Runs, whole: str) -> None:
    runs("flipped")
    file = runs.checkpoint("flipped", 20) / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-5] ^= 1
    file.write_bytes(content)
    out, err = runs("flipped", "--resume")
    assert "model.safetensors is damaged" in err
    assert "damaged-step-00000020" in err
    assert "step 10 to 20" in out
    assert weights(runs.checkpoint("flipped", 20)) == weights(runs.checkpoint("whole", 20))
    assert runs.losses("flipped") == runs.losses("whole")
    assert (runs.folder / "flipped" / "damaged-step-00000020").is_dir()


@pytest.mark.parametrize("damage", ["", "{}", '{"format": "x"}', '{"format": 1, "step": 10, "files": {}}', "[1]"])
def test_a_run_without_a_sound_checkpoint_never_starts_anew_by_itself(runs: Runs, damage: str) -> None:
    name = "unsound"
    if not (runs.folder / name).exists():
        runs(name, "--train.max_steps", "10")
        (runs.folder / name / "damaged-step-00000010").mkdir()
        runs.checkpoint(name, 10).rename(runs.folder / "kept")
    shutil.copytree(runs.folder / "kept", runs.checkpoint(name, 10))
    (runs.checkpoint(name, 10) / "manifest.json").write_text(damage)
    _, err = runs(name, "--train.max_steps", "10", "--resume", code=4)
    assert "no sound checkpoint left" in err
    assert "Traceback" not in err


def test_a_run_goes_on_when_the_reader_of_its_output_has_gone(runs: Runs, whole: str) -> None:
    process = runs.start("unread")
    assert process.stdout is not None
    process.stdout.readline()
    process.stdout.close()
    assert process.wait(timeout=120) == 0
    assert weights(runs.checkpoint("unread", 20)) == weights(runs.checkpoint("whole", 20))


def test_a_dropped_terminal_saves_and_stops_the_run(runs: Runs) -> None:
    process = runs.start("hangup")
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("step  3/"):
            process.send_signal(signal.SIGHUP)
            break
    out, err = process.communicate(timeout=60)
    assert process.returncode == 75, out + err
    status = json.loads((runs.folder / "hangup" / "status.json").read_text())
    assert status["outcome"] == "stopped"
    assert runs.checkpoint("hangup", status["step"]).exists()


def test_a_status_says_what_ended_a_run_that_failed(runs: Runs) -> None:
    _, err = runs(
        "failing", "--data.val_tokens", "1", "--model.max_length", "8192", "--data.val_fraction", "1e-9", code=3
    )
    status = json.loads((runs.folder / "failing" / "status.json").read_text())
    assert (status["outcome"], status["step"], status["exit_code"]) == ("failed", 0, 3)
    assert status["error"] in err


def test_a_diverging_run_stops_before_the_update_and_exits_5(runs: Runs) -> None:
    options = ("--train.lr", "1e30", "--train.max_grad_norm", "0", "--train.warmup_tokens", "0")
    _, err = runs("diverging", *options, code=5)
    assert "this step was neither applied nor saved" in err
    status = json.loads((runs.folder / "diverging" / "status.json").read_text())
    assert (status["outcome"], status["exit_code"]) == ("failed", 5)
    assert "neither applied nor saved" in status["error"]


def seal_again(checkpoint: Path, **changes: object) -> None:
    """Make the manifest of a checkpoint fit its changed state.json, with other changes of the manifest itself."""
    path, state = checkpoint / "manifest.json", (checkpoint / "state.json").read_bytes()
    manifest = json.loads(path.read_text()) | changes
    manifest["files"]["state.json"] = {"size": len(state), "sha256": hashlib.sha256(state).hexdigest()}
    path.write_text(json.dumps(manifest | {"sha256": _digest(manifest)}))


def test_epochs_end_the_run_when_the_documents_are_used_up(runs: Runs, tmp_path: Path) -> None:
    documents = tmp_path / "texts.jsonl"
    lines = [json.dumps({"text": f"document {i} says " + "word " * (20 + i % 50)}) for i in range(200)]
    documents.write_text("\n".join(lines))
    local = (
        "--data.current_datasets", "LOCAL", "--data.dataset_probabilities", "1", "--data.local_files", str(documents),
        "--data.bpe_vocab_size", "300", "--train.warmup_tokens", "300",
    )  # fmt: skip
    tokens, lengths = [], []
    for epochs in ("1", "2"):
        out, _ = runs(f"epochs{epochs}", *local, "--train.max_steps", "0", "--train.epochs", epochs)
        tokens.append(runs.records(f"epochs{epochs}")[-1]["tokens"])
        lengths += re.findall(r": step 0 to about ([\d,]+), ", out)
        assert "complete at step" in out
    # 4 streams: each stream's first token is no target; all others are, in each epoch.
    assert tokens[1] + 4 == 2 * (tokens[0] + 4)
    saved = ("--train.max_steps", "0", "--train.epochs", "1", "--train.save_every", "1", "--train.eval_every", "1000")
    runs("saved", *local, *saved)  # at its last step before it is known to be the last
    last = newest_checkpoint(runs.folder / "saved")
    assert last
    assert last.val_loss == runs.records("saved")[-2]["datasets"]["all"]["loss"]
    seal_again(last.path, val_loss=None)
    for _ in range(2):  # as if it had been killed before it was validated; then it is done
        runs("saved", *local, *saved, "--resume")
        assert newest_checkpoint(runs.folder / "saved") == last
    assert sum(record["kind"] == "validation" for record in runs.records("saved")) == 2
    _, err = runs("saved", *local, *saved, "--resume", "--train.max_steps", "5", code=2)
    assert "repeat the options of the run: --train.max_steps 0 --train.epochs 1\n" in err
    runs("turned", *local, "--train.max_steps", "5", "--train.epochs", "2")
    out, _ = runs("turned", *local, "--train.max_steps", "0", "--train.epochs", "2", "--resume")
    assert f": step 5 to about {lengths[1]}, " in out  # and not to the 5 that were to be all
    assert runs.records("turned")[-1]["tokens"] == tokens[1]


def test_the_default_preset_without_a_hub_says_so_in_one_line_and_15_seconds(tmp_path: Path) -> None:
    environment = os.environ | {"HF_ENDPOINT": "http://127.0.0.1:9"}  # nobody listens there
    started = time.monotonic()
    command = [sys.executable, str(ROOT / "train.py"), "--train.out_dir", str(tmp_path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 7
    assert time.monotonic() - started < 15
    assert len(done.stderr.strip().splitlines()) == 1
    for hint in ("--preset demo", "LOCAL", "HF_ENDPOINT", "HF_TOKEN"):
        assert hint in done.stderr


def test_generate_and_evaluate_a_run(runs: Runs, whole: str, tmp_path: Path) -> None:
    def script(name: str, *options: str, code: int = 0) -> tuple[str, str]:
        command = [sys.executable, str(ROOT / name), *options]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120)
        assert done.returncode == code, done.stdout + done.stderr
        return done.stdout, done.stderr

    run = str(runs.folder / "whole")
    greedy = [script("generate.py", run, "--prompt", "The people", "--temperature", "0")[0] for _ in range(2)]
    assert greedy[0] == greedy[1]
    assert greedy[0].startswith("The people")
    step, _ = script("generate.py", run + "/step-00000010", "--prompt", "The people", "--temperature", "0")
    assert step != greedy[0]
    rounded, _ = script("generate.py", run, "--prompt", "The people", "--temperature", "0", "--int8")
    assert rounded.startswith("The people")
    several, _ = script("generate.py", run, "--prompt", "A", "--num_samples", "3", "--max_tokens", "5", "--seed", "1")
    assert several.count("--- sample") == 3
    _, err = script("generate.py", run, "--temperature", "0", "--num_samples", "2", "--max_tokens", "5")
    assert "the 2 texts will be equal" in err
    (tmp_path / "prompt.txt").write_text("word " * 300)
    _, err = script("generate.py", run, "--prompt", f"@{tmp_path / 'prompt.txt'}", "--max_tokens", "5")
    assert "the model sees its last" in err
    out, _ = script("evals.py", run)
    assert "bits per byte" in out
    results = json.loads((runs.folder / "whole" / "eval-00000020.json").read_text())
    last = [r for r in runs.records("whole") if r["kind"] == "validation"][-1]
    assert results["held_out"]["all"]["loss"] == pytest.approx(last["datasets"]["all"]["loss"], rel=2e-3)
    for scores in (results["held_out"], last["datasets"]):
        together, parts = scores["all"], [score for name, score in scores.items() if name != "all"]
        errors = [part["tokens"] / together["tokens"] * part["loss_se"] for part in parts]
        assert min(errors) > 0
        assert together["loss_se"] == pytest.approx(math.hypot(*errors))
        assert together["documents"] == sum(part["documents"] for part in parts) > 10
        assert together["loss_se"] == pytest.approx(last["datasets"]["all"]["loss_se"], rel=0.02)
    _, err = script("generate.py", str(tmp_path / "nothing"), code=4)
    assert "is not there; give the folder of a run" in err
    assert "Traceback" not in err
    _, err = script("generate.py", f"{run}/step-20", code=4)
    assert f"did you mean {run}/step-00000020?" in err
    _, err = script("generate.py", run.replace("whole", "wohle"), code=4)
    assert f"did you mean {run}?" in err
    _, err = script("generate.py", str(runs.folder), code=4)
    assert "is no run but has some; name one: " in err
    assert "whole" in err


@pytest.mark.slow
def test_a_compiled_run_learns_like_an_eager_one(runs: Runs, whole: str) -> None:
    command = [part for part in runs.command("compiled") if part != "--train.no_compile"]
    environment = os.environ | {"TORCH_LOGS": "recompiles"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=400, env=environment)
    assert done.returncode == 0, done.stderr
    assert "compile   on" in done.stdout
    assert "Recompiling" not in done.stderr  # from the trial of the memory to the last step
    assert runs.losses("compiled") == pytest.approx(runs.losses("whole"), rel=0.02)


@pytest.mark.slow
def test_two_compiled_processes_train(runs: Runs) -> None:
    options = ("--train.batch_size", "2")
    command = [p for p in runs.command("compiled-two", *options, processes=2) if p != "--train.no_compile"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr
    assert len(runs.losses("compiled-two")) == 20


@pytest.mark.skipif(why_not_compile(torch.device("cpu")) is not None, reason="torch.compile does not work here")
def test_a_compiled_blocks_gradients_are_exchanged_while_those_before_it_are_computed(tmp_path: Path) -> None:
    (tmp_path / "exchange.py").write_text(
        """
import torch, torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from config import GPTConfig
from hardware import compile_for_training
from model import GPT

def exchange(state, bucket):
    events.append("exchange")
    return dist.all_reduce(bucket.buffer(), async_op=True).get_future().then(lambda done: done.value()[0])

def watch(module, inputs, output):
    output.register_hook(lambda gradient: events.append("reached the embedding"))

dist.init_process_group("gloo", init_method="file://" + FOLDER + "/store", rank=0, world_size=1)
model = GPT(GPTConfig(d_model=64, n_layers=4, n_heads=4, max_length=32).resolved(512))
compile_for_training(model, model.device)
model.embedding.register_forward_hook(watch)
trained = DistributedDataParallel(model, bucket_cap_mb=0.1)
trained.register_comm_hook(None, exchange)
ids = torch.randint(512, (4, 32))
torch._dynamo.utils.counters.clear()
for step in range(2):  # from the second on in the order in which gradients come
    events = []
    trained(ids, ids).backward()
    model.zero_grad()
before = events.index("reached the embedding")
made = torch._dynamo.utils.counters["inductor"]
print(before, len(events) - 1 - before, made["fxgraph_cache_miss"] + made["fxgraph_cache_hit"])
""".replace("FOLDER", repr(str(tmp_path)))
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(tmp_path / "exchange.py")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, env=environment)
    assert done.returncode == 0, done.stderr
    before, after, graphs = map(int, done.stdout.split())
    # Forward and backward of a block and of the norm, and the cross-entropy: not cut along DDP's buckets.
    assert graphs == 5
    assert before >= 4  # the loss and the last three blocks
    assert after >= 1  # and the first block's, with the embedding's


def test_a_checkpoint_without_its_manifest_is_damaged_and_never_overlooked(runs: Runs, whole: str) -> None:
    shutil.copytree(runs.folder / "whole", runs.folder / "beheaded")
    for step in (10, 20):
        (runs.checkpoint("beheaded", step) / "manifest.json").unlink()
    _, err = runs("beheaded", code=2)
    assert "already holds a run at step 20" in err
    _, err = runs("beheaded", "--resume", code=4)
    assert "no sound checkpoint left" in err
    status = json.loads((runs.folder / "beheaded/status.json").read_text())
    assert (status["outcome"], status["exit_code"]) == ("failed", 4)  # a launcher would not pass the code on


def test_a_manifest_with_another_meaning_is_damaged(runs: Runs, whole: str) -> None:
    shutil.copytree(runs.checkpoint("whole", 20), runs.folder / "altered" / "step-00000020")
    manifest = runs.checkpoint("altered", 20) / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"step": 20', '"step": 60'))
    done = subprocess.run(
        [sys.executable, str(ROOT / "evals.py"), str(manifest.parent)], capture_output=True, text=True
    )
    assert done.returncode == 4
    assert "manifest.json is damaged" in done.stderr


def test_variables_of_accelerate_do_not_change_a_run(runs: Runs, whole: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "inductor")
    runs("environment")
    assert weights(runs.checkpoint("environment", 20)) == weights(runs.checkpoint("whole", 20))


def test_a_run_that_went_further_is_not_called_complete(runs: Runs, whole: str) -> None:
    _, err = runs("whole", "--train.max_steps", "15", "--resume", code=2)
    assert "--train.max_steps 20" in err
    runs("whole", "--resume")  # whose status is complete again


def test_an_infinite_held_out_loss_ends_the_run_before_it_is_saved(runs: Runs) -> None:
    options = ("--train.warmup_tokens", "0", "--train.max_steps", "1", "--train.lr", "1e30")
    _, err = runs("infinite", *options, code=5)
    assert "the held-out loss is" in err
    assert not runs.checkpoint("infinite", 1).exists()


def test_a_torn_file_in_the_cache_is_made_again(runs: Runs, whole: str, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    options = ("--data.cache_dir", str(cache), "--train.max_steps", "2", "--train.warmup_tokens", "0")
    runs("cache", *options)
    for file in cache.iterdir():
        if file.is_file():
            file.write_bytes(file.read_bytes()[:100])
    runs("torn", *options)
    assert weights(runs.checkpoint("torn", 2)) == weights(runs.checkpoint("cache", 2))


# ---- trackers -------------------------------------------------------------------------------------


def test_tensorboard_shows_the_losses_and_samples_of_a_run_and_each_step_once_after_a_resume(runs: Runs) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    options = ("--train.trackers", "tensorboard", "--train.log_every", "1")
    process = runs.start("tracked", *options)
    assert process.stdout is not None
    while "saved" not in process.stdout.readline():
        pass
    process.kill()
    process.communicate()
    runs("tracked", *options, "--resume")
    shown = EventAccumulator(str(runs.folder / "tracked" / "tensorboard"))
    shown.Reload()
    points = [(event.step, pytest.approx(event.value)) for event in shown.Scalars("train/loss")]
    assert points == [(r["step"], r["loss"]) for r in runs.records("tracked") if r["kind"] == "train"]
    assert [event.step for event in shown.Scalars("validation/datasets/all/bits_per_byte")] == [10, 20]
    (text, *_) = shown.Tensors("validation/samples/text_summary")
    assert text.tensor_proto.string_val[0].decode().startswith("The people of")


def test_a_resumed_run_may_be_shown_elsewhere_or_nowhere_from_then_on(runs: Runs) -> None:
    runs("shown")
    runs("shown", "--train.max_steps", "22", "--resume", "--train.trackers", "tensorboard")
    assert [*(runs.folder / "shown" / "tensorboard").iterdir()]
    out, _ = runs("shown", "--train.max_steps", "23", "--resume")
    assert "complete at step 23" in out


def test_a_tracker_that_is_not_installed_ends_the_run_before_the_first_step(runs: Runs) -> None:
    _, err = runs("untracked", "--train.trackers", "wandb", code=2)
    assert err.splitlines()[-1] == "error: train.trackers has wandb, which is not installed: pip install wandb"
    status = json.loads((runs.folder / "untracked" / "status.json").read_text())
    assert (status["outcome"], status["exit_code"]) == ("failed", 2)  # for whoever starts a run again
    assert not (runs.folder / "untracked" / "metrics.jsonl").exists()


def test_a_tracker_that_fails_is_named_once_and_the_run_goes_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    class Failing:
        name = "elsewhere"

        def log(self, values: dict, step: int) -> None:
            raise ConnectionError("no route")

    failing: Any = Failing()
    log = MetricsFile(tmp_path / "metrics.jsonl", 0, [failing])
    for step in (1, 2):
        log.write("train", step, loss=1.0)
    assert capsys.readouterr().err == "warning: elsewhere shows no more of this run: no route\n"
    assert [r["step"] for r in read_metrics(tmp_path / "metrics.jsonl")] == [1, 2]


@pytest.mark.parametrize(
    ("tokens", "shown"),
    [
        (0, "0"),
        (999_999, "999,999"),
        (2_293_760, "2.3M"),
        (999_949_999, "999.9M"),
        (999_950_000, "1.0B"),
        (10**10, "10.0B"),
    ],
)
def test_few_tokens_are_counted_and_many_rounded(tokens: int, shown: str):
    assert amount(tokens) == shown


def test_the_time_left_counts_the_validations_and_checkpoints_that_are_still_to_come(monkeypatch: pytest.MonkeyPatch):
    now = [0.0]
    monkeypatch.setattr("metrics.time.perf_counter", lambda: now[0])

    def validate() -> str:
        now[0] += 7.0
        return "a loss"

    def save() -> None:
        now[0] += 2.0

    meter, line = Meter(), {"loss": 2.0, "lr": 0.02, "grad_norm": 1.0}

    def eta(step: int) -> str:
        meter.add(1000, 10.0, 0.0)  # ten steps of 100 tokens, of a second each
        left = meter.pauses_left(step, 55)
        return log_line(step, 55, line | meter.read(), 100, left).rpartition("| eta ")[2]

    assert eta(10) == "45s"
    assert meter.pause(20, validate) == "a loss"  # as after a resume, or by save_minutes: at any step
    assert eta(11) == "1m05s"  # 44, and validations at 20, 40 and 55
    meter.pause(25, save)
    assert eta(19) == "1m03s"  # 36, and checkpoints at 25, 50 and 55 as well
    assert eta(20) == "1m02s"  # the validation behind this step is still to come
    assert eta(50) == "16s"
    assert eta(55) == "9s"
    assert eta(100) == "9s"  # epochs end about where they were foretold: later too
