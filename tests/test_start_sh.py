"""start.sh with fakes first on PATH: nvidia-smi with 0, 1 or 8 GPUs, broken or hanging; python and accelerate
that write down their arguments and end as told. Nothing is installed; only the slow tests train. Terminals, signals
and processes are real."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import pty
import random
import re
import select
import shutil
import signal
import subprocess
import sys
import termios
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parent.parent
TOOLS = (
    "awk bash cat cp cut dirname env find flock getconf grep mkdir nohup nproc paste rm sed setsid sha256sum sleep "
    "sort tail touch tr uname uniq wc"
)
SAMPLE = "generate.py checkpoints/demo --prompt The people of the United States --max_tokens 100"
LAUNCH = "launch --multi_gpu --num_processes 8 --num_machines 1 --mixed_precision no --dynamo_backend no"

# A training: waits for signals, or at its n-th start does as the n-th word of FAKE_ATTEMPTS says (the last is
# repeated): reaches a checkpoint (-1: all are damaged) / leaves this code in status.json (-: none) / ends with this
# code, or by SIGKILL.
FAKE_TRAINING = r"""
if [[ ${FAKE_TRAIN_WAITS:-} ]]; then
  if [[ $FAKE_TRAIN_WAITS == deaf ]]; then end=''; else end='exit 75'; fi
  for s in INT TERM; do trap "echo $s >> '$FAKE_LOG'; $end" $s; done
  echo training
  while :; do sleep 0.05; done
fi
words=(${FAKE_ATTEMPTS:-0/-/${FAKE_TRAIN_EXIT:-0}})
n=$(grep -c train.py "$FAKE_LOG")
IFS=/ read -r step status end <<< "${words[n - 1]:-${words[${#words[@]} - 1]}}"
run=checkpoints/fineweb
if ((step < 0)); then rm -r $run/step-*; fi
if ((step > 0)); then mkdir -p "$run/step-$(printf %08d "$step")"; fi
if [[ $status != - ]]; then
  printf '{\n "time": %s,\n "exit_code": %s,\n "error": "x"\n}\n' "$n" "$status" > $run/status.json
fi
if [[ $end == KILL ]]; then kill -KILL $$; fi
exit "$end"
"""

FAKE_PYTHON = (
    """#!/usr/bin/env bash
case "$*" in
  *version_info*) exit "${FAKE_TOO_OLD:-0}" ;;
  *"import torch"*) echo "${FAKE_TORCH:-0 None}"; exit "${FAKE_TORCH_EXIT:-0}" ;;
  *--version*) echo "Python 3.11.7"; exit ;;
  *--check_disk) echo "Checkpoints: $*, $WORLD_SIZE processes"; exit "${FAKE_DISK_EXIT:-0}" ;;
esac
echo "python $*" >> "$FAKE_LOG"
case "$*" in
  "-m venv"*) mkdir -p .venv/bin && cp "$0" .venv/bin/python; exit ;;
  *"install"*)
    while [[ ${FAKE_PIP_WAITS_FOR:-} && ! -e $FAKE_PIP_WAITS_FOR ]]; do sleep 0.05; done
    exit "${FAKE_PIP_EXIT:-0}" ;;
  scripts/calc_params.py*) echo "parameters of $3 for $WORLD_SIZE" ;;
  train.py*) """
    + FAKE_TRAINING
    + """;;
esac
"""
)

FAKE_ACCELERATE = '#!/usr/bin/env bash\necho "accelerate $*" >> "$FAKE_LOG"\n' + FAKE_TRAINING


def processes_with(mark: str) -> list[int]:
    """The running processes that have this NAME=value in their environment."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it has ended
            if mark.encode() in (folder / "environ").read_bytes().split(b"\0"):
                found.append(int(folder.name))
    return found


def kill_all(mark: str) -> None:
    """What a power cut does to the processes with this mark, which their children inherit."""
    while found := processes_with(mark):
        for number in found:
            with contextlib.suppress(ProcessLookupError):
                os.kill(number, signal.SIGKILL)


def wait_until(true: Callable[[], object], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, "in vain"
        time.sleep(0.02)


@dataclass
class Repo:
    """A copy of start.sh in a folder of its own, with an environment that counts as installed."""

    path: Path
    tools: Path
    env: dict[str, str]

    def fake(self, name: str, script: str) -> None:
        target = self.tools / name
        target.unlink(missing_ok=True)
        target.write_text(script)
        target.chmod(0o755)

    def gpus(self, *names: str, memory: str = "81559") -> None:
        if sys.platform != "linux":
            pytest.skip("training on GPUs needs Linux")
        lines = "".join(f"echo '{name}, {memory}'\n" for name in names)
        self.fake("nvidia-smi", f'#!/usr/bin/env bash\necho query >> "$FAKE_LOG.smi"\n{lines}')
        self.env["FAKE_TORCH"] = f"{len(names)} 13.0"

    def install(self) -> None:
        python = self.path / ".venv/bin/python"
        python.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(self.tools / "python3", python)
        digest = hashlib.sha256((self.path / "requirements.txt").read_bytes()).hexdigest()
        (self.path / ".venv/.requirements.sha256").write_text(digest + "\n")

    def start(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        command = [str(self.path / "start.sh"), *arguments]
        return subprocess.run(
            command,
            env=self.env,
            cwd="/",
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=100,
        )

    def log(self, run: str = "fineweb") -> str:
        return (self.path / "checkpoints" / run / "start.log").read_text()

    @property
    def pauses(self) -> list[str]:
        """How long the supervisor slept, with a `sleep` that takes no time."""
        return Path(self.env["FAKE_LOG"] + ".sleeps").read_text().split()

    @property
    def ran(self) -> list[str]:
        """What python and accelerate were asked to do, in order."""
        log = Path(self.env["FAKE_LOG"])
        return log.read_text().splitlines() if log.exists() else []


@pytest.fixture
def repo(tmp_path: Path) -> Iterator[Repo]:
    path, tools = tmp_path / "a repo", tmp_path / "tools"
    (path / "scripts").mkdir(parents=True)
    tools.mkdir()
    for name in ("start.sh", "scripts/lib.sh", "scripts/supervise.sh", "requirements.txt"):
        shutil.copy(REPO / name, path / name)
    for tool in TOOLS.split():  # nothing else is on PATH, least of all this machine's nvidia-smi
        found = shutil.which(tool)
        if found:
            (tools / tool).symlink_to(found)
    env = {
        "PATH": str(tools),
        "HOME": str(tmp_path),
        "FAKE_LOG": str(tmp_path / "log"),
        "WORKSPACE": "/nowhere",
    }
    made = Repo(path, tools, env)
    made.fake("python3", FAKE_PYTHON)
    made.fake("accelerate", FAKE_ACCELERATE)
    made.install()
    yield made
    kill_all(f"FAKE_LOG={made.env['FAKE_LOG']}")


class Terminal:
    """start.sh at a terminal of its own, such as sshd makes."""

    def __init__(self, repo: Repo, *arguments: str) -> None:
        self.screen, inside = pty.openpty()

        def take_terminal() -> None:
            os.setsid()
            fcntl.ioctl(inside, termios.TIOCSCTTY, 0)

        self.arguments = arguments
        self.process = subprocess.Popen(
            [str(repo.path / "start.sh"), *arguments],
            env=repo.env,
            stdin=inside,
            stdout=inside,
            stderr=inside,
            preexec_fn=take_terminal,
        )
        os.close(inside)
        self.shown = ""

    def see(self, text: str = "") -> str:
        """What is shown until this text appears; without one, until start.sh ends."""
        deadline = time.monotonic() + 60
        with contextlib.suppress(OSError):  # the other side is closed
            while not text or text not in self.shown:
                assert select.select([self.screen], [], [], deadline - time.monotonic())[0], self.shown
                self.shown += os.read(self.screen, 4096).decode().replace("\r\n", "\n")
        assert text in self.shown, self.shown
        return self.shown

    def press_ctrl_c(self) -> None:
        os.write(self.screen, b"\x03")

    def hang_up(self) -> int:
        os.close(self.screen)
        return self.process.wait(10)


def test_help_names_every_option_and_starts_nothing(repo: Repo) -> None:
    for flag in ("--help", "-h"):
        result = repo.start(flag)
        assert result.returncode == 0
        assert all(option in result.stdout for option in ("--skip-deps", "--dry-run", "--help"))
    assert repo.ran == []


@pytest.mark.parametrize(
    ("typed", "hint"),
    [
        ("--dryrun", "did you mean --dry-run?"),
        ("--dry_run", "did you mean --dry-run?"),
        ("--skipdeps", "did you mean --skip-deps?"),
        ("--no-deps", "did you mean --skip-deps?"),
        ("--hlep", "did you mean --help?"),
        ("--train.lr", "options of train.py go behind --, see ./start.sh --help"),
    ],
)
def test_an_unknown_option_exits_2_with_a_suggestion(repo: Repo, typed: str, hint: str) -> None:
    result = repo.start(typed)
    assert result.returncode == 2
    assert result.stderr == f"error: unknown option {typed}; {hint}\n"
    assert repo.ran == []


@pytest.mark.parametrize("option", ["--help", "-h", "--plan", "--check"])
def test_an_option_of_train_that_starts_no_run_is_refused_before_anything_is_made(repo: Repo, option: str) -> None:
    repo.gpus("NVIDIA L4")
    result = repo.start("--", "--preset", "gpt2", option)
    assert (result.returncode, result.stdout, repo.ran) == (2, "", [])
    assert result.stderr == f"error: {option} starts no run; ask train.py itself: python train.py {option}\n"
    assert not (repo.path / "checkpoints").exists()


def test_without_a_gpu_it_trains_the_demo_and_samples_from_it(repo: Repo) -> None:
    result = repo.start()
    assert result.returncode == 0, result.stderr
    assert repo.ran == ["python train.py --preset demo --resume", f"python {SAMPLE}"]
    assert "Hardware: no GPU; " in result.stdout
    assert "--data.local_files my.txt" in result.stdout


def test_a_second_start_does_the_same_and_installs_nothing(repo: Repo) -> None:
    first, second = repo.start(), repo.start()
    assert first.stdout == second.stdout
    assert not [line for line in repo.ran if "pip" in line or "venv" in line]


def test_with_one_gpu_it_trains_the_default_run_without_a_launcher(repo: Repo) -> None:
    repo.gpus("NVIDIA H100 80GB HBM3")
    result = repo.start()
    assert result.returncode == 0, result.stderr
    assert repo.ran == ["python train.py --resume"]
    assert "Hardware: 1 x NVIDIA H100 80GB HBM3 (81559 MiB)\n" in result.stdout


def test_with_eight_gpus_it_launches_eight_processes_after_one_query(repo: Repo) -> None:
    repo.gpus(*["NVIDIA A100-SXM4-40GB"] * 8, memory="40960")
    result = repo.start("--", "--preset", "gpt2")
    assert result.returncode == 0, result.stderr
    assert repo.ran == [f"accelerate {LAUNCH} train.py --resume --preset gpt2"]
    assert "Hardware: 8 x NVIDIA A100-SXM4-40GB (40960 MiB)\n" in result.stdout
    assert Path(repo.env["FAKE_LOG"] + ".smi").read_text() == "query\n"


def test_gpus_with_unreported_memory_and_of_two_kinds_are_described_on_one_line(repo: Repo) -> None:
    repo.gpus("NVIDIA GB10", "NVIDIA L4", memory="[N/A]")
    result = repo.start("--dry-run")
    assert result.returncode == 0, result.stderr
    assert "Hardware: 1 x NVIDIA GB10 ([N/A] MiB);1 x NVIDIA L4 ([N/A] MiB)\n" in result.stdout


def test_a_slice_of_a_gpu_whose_memory_a_container_may_not_see_is_used(repo: Repo) -> None:
    repo.gpus("NVIDIA A100-SXM4-80GB", memory="[Insufficient Permissions]")
    result = repo.start("--dry-run")
    assert result.returncode == 0, result.stderr
    assert "Hardware: 1 x NVIDIA A100-SXM4-80GB ([Insufficient Permissions] MiB)\n" in result.stdout


def test_little_shared_memory_for_several_gpus_is_warned_of_with_a_remedy(repo: Repo) -> None:
    repo.fake("df", "#!/usr/bin/env bash\necho 1K-blocks\necho 65536\n")
    repo.gpus("NVIDIA L4")
    assert "shm" not in repo.start("--dry-run").stderr
    repo.gpus(*["NVIDIA L4"] * 8)
    result = repo.start("--dry-run")
    assert result.returncode == 0
    assert result.stderr.startswith("warning: /dev/shm has 64 MB, and 8 processes may need more;")
    assert "--shm-size=1g" in result.stderr


@pytest.mark.parametrize("script", ["exit 0", "echo No devices were found", "echo No devices were found; exit 6"])
def test_an_nvidia_smi_without_devices_means_no_gpu(repo: Repo, script: str) -> None:
    repo.fake("nvidia-smi", f"#!/usr/bin/env bash\n{script}\n")
    result = repo.start()
    assert result.returncode == 0, result.stderr
    assert repo.ran[0] == "python train.py --preset demo --resume"


@pytest.mark.parametrize(
    ("script", "cause"),
    [
        ("echo NVIDIA-SMI has failed; exit 9", "nvidia-smi failed with exit code 9 (NVIDIA-SMI has failed)"),
        ("exit 255", "nvidia-smi failed with exit code 255 (no message)"),
        ("exec sleep 8", "nvidia-smi gave no answer within 1 s"),
        ("echo '<html>'", "nvidia-smi printed '<html>' for a GPU"),
        ("echo 'NVIDIA L4, [GPU is lost]'", "nvidia-smi printed 'NVIDIA L4, [GPU is lost]' for a GPU"),
    ],
)
def test_a_broken_driver_exits_2_with_cause_and_remedy(repo: Repo, script: str, cause: str) -> None:
    repo.fake("nvidia-smi", f"#!/usr/bin/env bash\n{script}\n")
    repo.env["NVIDIA_SMI_TIMEOUT"] = "1"
    began = time.monotonic()
    result = repo.start()
    assert result.returncode == 2
    assert result.stderr.startswith(f"error: {cause}; the driver does not work: restart the machine")
    assert result.stderr.count("\n") == 1
    assert repo.ran == []
    assert time.monotonic() - began < 6


def test_hiding_a_broken_gpu_trains_without_it_as_the_remedy_says(repo: Repo) -> None:
    repo.fake("nvidia-smi", "#!/usr/bin/env bash\nexit 9\n")
    repo.env["CUDA_VISIBLE_DEVICES"] = ""
    assert repo.start().returncode == 0
    assert repo.ran[0] == "python train.py --preset demo --resume"


def test_a_choice_of_gpus_by_cuda_visible_devices_is_kept(repo: Repo) -> None:
    repo.gpus(*["NVIDIA L4"] * 8)
    repo.env |= {"CUDA_VISIBLE_DEVICES": "3", "FAKE_TORCH": "1 13.0"}
    result = repo.start()
    assert "leaves 1 of 8 GPUs" in result.stdout
    assert repo.ran == ["python train.py --resume"]
    repo.env["FAKE_TORCH"] = "0 13.0"
    result = repo.start()
    assert result.returncode == 2
    assert "names no GPU of this machine that torch's CUDA 13.0 can use; unset it, and if that" in result.stderr


def test_a_disk_without_locks_is_refused_and_not_taken_for_another_start(repo: Repo) -> None:
    repo.gpus("NVIDIA L4")
    repo.fake("flock", "#!/usr/bin/env bash\nexit 71\n")  # as it ends where the disk has none
    result = repo.start()
    assert result.returncode == 6
    assert "is on a disk that has no locks; choose another --train.out_dir" in result.stderr


@pytest.mark.parametrize(
    ("torch", "cause"),
    [
        ("0 13.0", "torch sees 0 of 8 GPUs; the driver is likely too old for torch's CUDA 13.0"),
        ("7 13.0", "torch sees 7 of 8 GPUs"),
        ("0 None", "this torch is built without CUDA"),
    ],
)
def test_gpus_that_torch_cannot_use_exit_2_with_a_remedy(repo: Repo, torch: str, cause: str) -> None:
    repo.gpus(*["NVIDIA L4"] * 8)
    repo.env["FAKE_TORCH"] = torch
    result = repo.start()
    assert result.returncode == 2
    assert f"error: {cause}" in result.stderr
    assert repo.ran == []


@pytest.mark.parametrize("code", [1, 2, 3, 4, 5, 6, 75])
def test_the_exit_code_of_training_is_passed_on_and_no_sample_is_taken(repo: Repo, code: int) -> None:
    repo.env["FAKE_TRAIN_EXIT"] = str(code)
    result = repo.start()
    assert result.returncode == code
    assert repo.ran == ["python train.py --preset demo --resume"]
    last_line = (result.stdout if code == 75 else result.stderr).splitlines()[-1]
    assert ("./start.sh" in last_line) == (code != 2)  # repeating a wrong setting would not help


def test_what_to_run_again_is_what_was_given(repo: Repo) -> None:
    repo.env["FAKE_TRAIN_EXIT"] = "75"
    result = repo.start("--skip-deps", "--", "--preset", "smoke", "--train.out_dir", "my runs")
    assert result.stdout.endswith("To go on: ./start.sh --skip-deps -- --preset smoke --train.out_dir 'my runs'\n")


@pytest.mark.parametrize("sent", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_reaches_the_demo_run_exactly_once(repo: Repo, sent: signal.Signals) -> None:
    repo.env["FAKE_TRAIN_WAITS"] = "1"
    with subprocess.Popen(
        [str(repo.path / "start.sh")], env=repo.env, stdout=subprocess.PIPE, text=True, start_new_session=True
    ) as process:
        assert process.stdout is not None
        while process.stdout.readline() != "training\n":
            assert process.poll() is None
        os.killpg(process.pid, sent)  # as a terminal or a supervisor does: to the whole group
        rest = process.stdout.read()
    assert process.returncode == 75
    assert rest == "Stopped, and everything is saved. To go on: ./start.sh\n"
    assert repo.ran == ["python train.py --preset demo --resume", sent.name.removeprefix("SIG")]


def test_dry_run_prints_the_plan_and_the_settings_and_starts_nothing(repo: Repo) -> None:
    result = repo.start("--dry-run")
    assert result.returncode == 0, result.stderr
    assert repo.ran == ["python scripts/calc_params.py --preset demo"]
    assert result.stdout.splitlines()[1:] == [
        "Checkpoints: scripts/calc_params.py --preset demo --check_disk, 1 processes",
        "Plan:",
        "  python train.py --preset demo --resume",
        f"  python {SAMPLE}".replace("The people of the United States", "'The people of the United States'"),
        "Settings:",
        "parameters of demo for 1",
        "Nothing was started (--dry-run).",
    ]


def test_dry_run_on_eight_gpus_shows_the_launch_and_checks_settings_for_eight(repo: Repo) -> None:
    repo.gpus(*["NVIDIA L4"] * 8)
    result = repo.start("--dry-run", "--", "--train.lr", "0.01")
    assert f"  accelerate {LAUNCH} train.py --resume --train.lr 0.01\n" in result.stdout
    assert "parameters of fineweb for 8\n" in result.stdout
    assert "generate.py" not in result.stdout
    assert repo.ran == ["python scripts/calc_params.py --preset fineweb --train.lr 0.01"]
    repo.start("--dry-run", "--", "--train.lr=0.02", "--preset", "gpt2")
    assert repo.ran[1:] == ["python scripts/calc_params.py --train.lr=0.02 --preset gpt2"]


def test_a_run_that_goes_on_is_not_held_to_the_batch_of_this_hardware(repo: Repo) -> None:
    repo.gpus(*["NVIDIA L4"] * 2)
    assert "--check_disk" in repo.start("--dry-run").stdout
    assert "--resume" not in repo.ran[0]
    (repo.path / "checkpoints/fineweb/step-00000010").mkdir(parents=True)
    repo.start("--dry-run", "--", "--train.batch_size", "4")
    assert repo.ran[1] == "python scripts/calc_params.py --preset fineweb --train.batch_size 4 --resume"


def test_what_follows_two_dashes_goes_to_train_and_decides_where_the_sample_comes_from(repo: Repo) -> None:
    result = repo.start("--", "--preset", "smoke", "--train.run_name=mine", "--train.out_dir", "my runs")
    assert result.returncode == 0, result.stderr
    assert repo.ran == [
        "python train.py --resume --preset smoke --train.run_name=mine --train.out_dir my runs",
        f"python {SAMPLE}".replace("checkpoints/demo", "my runs/mine"),
    ]
    assert "  python evals.py 'my runs/mine'\n" in result.stdout


def test_a_first_start_makes_the_environment_and_a_changed_requirement_renews_it(repo: Repo) -> None:
    shutil.rmtree(repo.path / ".venv")
    install = "python -m pip install -qq --disable-pip-version-check --progress-bar off -r requirements.txt"
    settings = "python scripts/calc_params.py --preset demo"
    first = repo.start("--dry-run")
    assert first.returncode == 0, first.stderr
    assert repo.ran == ["python -m venv --clear .venv", install, settings]
    assert repo.start("--dry-run").returncode == 0
    assert repo.ran[3:] == [settings]
    with (repo.path / "requirements.txt").open("a") as file:
        file.write("# changed\n")
    assert repo.start("--dry-run").returncode == 0
    assert repo.ran[4:] == [install, settings]


def test_an_installation_that_failed_is_an_error_and_is_tried_again(repo: Repo) -> None:
    shutil.rmtree(repo.path / ".venv")
    repo.env["FAKE_PIP_EXIT"] = "1"
    result = repo.start()
    assert result.returncode == 1
    assert "error: pip could not install requirements.txt" in result.stderr
    repo.env["FAKE_PIP_EXIT"] = "0"
    assert repo.start().returncode == 0
    assert sum("pip install" in line for line in repo.ran) == 2


def test_a_machine_without_python_311_exits_2_and_says_what_to_install(repo: Repo) -> None:
    shutil.rmtree(repo.path / ".venv")
    repo.env["FAKE_TOO_OLD"] = "1"
    result = repo.start()
    assert result.returncode == 2
    assert result.stderr.startswith("error: no Python 3.11 to 3.14 on PATH; install one")


def test_skip_deps_installs_nothing_and_says_which_python_it_uses(repo: Repo) -> None:
    with (repo.path / "requirements.txt").open("a") as file:
        file.write("# changed\n")
    result = repo.start("--skip-deps")
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith(f"Installing nothing (--skip-deps); using {repo.path}/.venv/bin/python\n")
    assert repo.ran == ["python train.py --preset demo --resume", f"python {SAMPLE}"]


def test_skip_deps_without_an_environment_uses_the_python_on_path(repo: Repo) -> None:
    shutil.rmtree(repo.path / ".venv")
    result = repo.start("--skip-deps")
    assert result.returncode == 0, result.stderr
    assert f"using {repo.tools}/python3\n" in result.stdout
    assert not (repo.path / ".venv").exists()


def test_skip_deps_with_a_python_that_lacks_torch_says_so_before_training(repo: Repo) -> None:
    repo.env |= {"FAKE_TORCH": "ModuleNotFoundError: No module named 'torch'", "FAKE_TORCH_EXIT": "1"}
    result = repo.start("--skip-deps")
    assert result.returncode == 2
    assert "cannot import torch (ModuleNotFoundError: No module named 'torch')" in result.stderr
    assert "run ./start.sh without --skip-deps" in result.stderr
    assert repo.ran == []


def test_downloads_go_to_the_large_disk_unless_a_place_is_chosen(repo: Repo, tmp_path: Path) -> None:
    repo.env["WORKSPACE"] = str(tmp_path)
    assert f"Downloads are kept in {tmp_path}/.cache/huggingface\n" in repo.start("--dry-run").stdout
    repo.env["HF_HOME"] = "/elsewhere"
    assert "Downloads are kept in /elsewhere\n" in repo.start("--dry-run").stdout


# ---- room on the disk, and several machines ------------------------------------------------------


@pytest.mark.parametrize("n_gpus", [0, 1])
def test_too_little_room_for_checkpoints_ends_it_before_training(repo: Repo, n_gpus: int) -> None:
    repo.gpus(*["NVIDIA L4"] * n_gpus)
    repo.env["FAKE_DISK_EXIT"] = "6"
    assert repo.start().returncode == 6
    assert repo.ran == []


def test_each_of_several_machines_launches_its_part(repo: Repo) -> None:
    repo.gpus(*["NVIDIA L4"] * 8)
    repo.env |= {"NUM_MACHINES": "2", "MACHINE_RANK": "1", "MASTER_ADDR": "10.0.0.5", "MASTER_PORT": "29500"}
    result = repo.start()
    assert result.returncode == 0, result.stderr
    machines = "s 2 --machine_rank 1 --main_process_ip 10.0.0.5 --main_process_port 29500 "
    launch = LAUNCH.replace("s 8 ", "s 16 ").replace("s 1 ", machines)
    assert repo.ran == [f"accelerate {launch} train.py --resume"]
    assert "for 16" in repo.start("--dry-run").stdout
    assert (repo.path / "checkpoints/fineweb/start1.log").exists()  # the other machine writes start.log beside it


def test_two_machines_of_one_gpu_each_use_the_launcher(repo: Repo) -> None:
    repo.gpus("NVIDIA L4")
    repo.env |= {"NUM_MACHINES": "2", "MACHINE_RANK": "0", "MASTER_ADDR": "a", "MASTER_PORT": "1024"}
    repo.start()
    assert "--num_processes 2 --num_machines 2" in repo.ran[0]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ("NUM_MACHINES=2", "NUM_MACHINES is 2 and MACHINE_RANK is not set"),
        ("NUM_MACHINES=2 MACHINE_RANK=0", "NUM_MACHINES is 2 and MASTER_ADDR is not set"),
        ("NUM_MACHINES=2 MACHINE_RANK=0 MASTER_ADDR=a", "NUM_MACHINES is 2 and MASTER_PORT is not set"),
        ("MACHINE_RANK=0", "NUM_MACHINES is not set and MACHINE_RANK is 0"),
        ("MASTER_ADDR=a", "NUM_MACHINES is not set and MASTER_ADDR is a"),
        ("NUM_MACHINES=2 MACHINE_RANK=2 MASTER_ADDR=a MASTER_PORT=1", "NUM_MACHINES is '2', MACHINE_RANK '2'"),
        ("NUM_MACHINES=2 MACHINE_RANK=-1 MASTER_ADDR=a MASTER_PORT=1", "NUM_MACHINES is '2', MACHINE_RANK '-1'"),
        ("NUM_MACHINES=1 MACHINE_RANK=1", "NUM_MACHINES is '1', MACHINE_RANK '1'"),
        ("NUM_MACHINES=two MACHINE_RANK=1 MASTER_ADDR=a MASTER_PORT=1", "NUM_MACHINES is 'two'"),
        ("NUM_MACHINES=2 MACHINE_RANK=1 MASTER_ADDR=a MASTER_PORT=http", "MASTER_PORT 'http'; use a number"),
    ],
)
def test_a_missing_or_contradictory_machine_setting_exits_2(repo: Repo, settings: str, message: str) -> None:
    repo.gpus("NVIDIA L4")
    repo.env |= dict(setting.split("=") for setting in settings.split())
    result = repo.start()
    assert result.returncode == 2
    assert result.stderr.startswith("error: ")
    assert message in result.stderr
    assert result.stderr.count("\n") == 1
    assert repo.ran == []


def test_several_machines_without_gpus_exit_2(repo: Repo) -> None:
    repo.env |= {"NUM_MACHINES": "2", "MACHINE_RANK": "0", "MASTER_ADDR": "a", "MASTER_PORT": "1024"}
    result = repo.start()
    assert (result.returncode, repo.ran) == (2, [])
    assert "this one has no GPU" in result.stderr


# ---- a run on GPUs, its supervisor and its terminals -----------------------------------------------


def test_the_run_outlives_its_terminal_and_a_second_start_follows_it_until_ctrl_c_stops_it(repo: Repo) -> None:
    repo.gpus("NVIDIA L4")
    repo.env["FAKE_TRAIN_WAITS"] = "1"
    first = Terminal(repo)
    first.see("\ntraining\n")
    assert first.hang_up() == 129
    time.sleep(0.3)
    second = Terminal(repo)
    assert re.search(r"Already running \(process \d+\)", second.see("\ntraining\n"))
    second.press_ctrl_c()
    assert second.see().endswith("Stopped, and everything is saved. To go on: ./start.sh\n")
    assert second.process.wait(10) == 75
    assert repo.ran == ["python train.py --resume", "TERM"]


def test_ctrl_c_at_the_first_terminal_stops_the_run_and_it_goes_on_at_the_next_start(repo: Repo) -> None:
    repo.gpus("NVIDIA L4")
    repo.env["FAKE_TRAIN_WAITS"] = "1"
    terminal = Terminal(repo)
    terminal.see("\ntraining\n")
    terminal.press_ctrl_c()
    assert "the run was stopped; everything is saved" in terminal.see()
    assert terminal.process.wait(10) == 75
    del repo.env["FAKE_TRAIN_WAITS"]
    assert repo.start().returncode == 0
    assert repo.ran == ["python train.py --resume", "TERM", "python train.py --resume"]


def test_a_third_ctrl_c_ends_a_run_that_does_not_listen(repo: Repo) -> None:
    repo.gpus("NVIDIA L4")
    repo.env["FAKE_TRAIN_WAITS"] = "deaf"
    terminal = Terminal(repo)
    terminal.see("\ntraining\n")
    for n in (1, 2):
        terminal.press_ctrl_c()
        wait_until(lambda n=n: repo.ran.count("TERM") == n)  # type: ignore[misc]
        time.sleep(2)  # what comes at once is one request
    terminal.press_ctrl_c()
    assert "stopped with exit code 137" in terminal.see()
    assert terminal.process.wait(10) == 137
    assert repo.ran.count("python train.py --resume") == 1


def test_two_starts_at_once_install_once_and_train_once(repo: Repo, tmp_path: Path) -> None:
    repo.gpus("NVIDIA L4")
    shutil.rmtree(repo.path / ".venv")
    repo.env |= {"FAKE_TRAIN_WAITS": "1", "FAKE_PIP_WAITS_FOR": str(tmp_path / "go")}
    first = Terminal(repo)
    first.see("Installing")
    second = Terminal(repo)
    second.see("Another ./start.sh is getting this run ready")
    (tmp_path / "go").touch()
    for terminal in (first, second):
        terminal.see("\ntraining\n")
    second.press_ctrl_c()
    for terminal in (first, second):
        terminal.see("Stopped, and everything is saved")
        assert terminal.process.wait(10) == 75
    assert [line for line in repo.ran if "install" not in line and "venv" not in line] == [
        "python train.py --resume",
        "TERM",
    ]
    assert len(repo.ran) == 4


def test_what_a_killed_supervisor_leaves_behind_is_ended_before_the_run_starts_again(repo: Repo) -> None:
    repo.gpus("NVIDIA L4")
    repo.env["FAKE_TRAIN_WAITS"] = "1"
    first = Terminal(repo)
    first.see("\ntraining\n")
    supervisor = int((repo.path / "checkpoints/fineweb/.start.lock").read_text())
    mark = f"SUPERVISED_BY={repo.path}/checkpoints/fineweb/.start.lock"
    orphan = min(processes_with(mark))
    os.kill(supervisor, signal.SIGKILL)
    assert first.process.wait(10) == 137
    assert orphan in processes_with(mark)  # it goes on training
    second = Terminal(repo)
    second.see("\ntraining\n")
    assert orphan not in processes_with(mark)
    assert "Already running" not in second.shown
    second.press_ctrl_c()
    second.see("Stopped")
    assert repo.ran == ["python train.py --resume", "python train.py --resume", "TERM"]


def test_a_run_whose_folder_was_removed_is_not_started_again_beside_the_one_that_has_begun_there(repo: Repo) -> None:
    repo.gpus("NVIDIA L4")
    repo.env |= {"FAKE_TRAIN_WAITS": "1", "RESTART_PAUSE": "1"}
    first = Terminal(repo)
    first.see("\ntraining\n")
    shutil.rmtree(repo.path / "checkpoints/fineweb")
    second = Terminal(repo)  # ends the processes of the first, which has the same folder
    second.see("\ntraining\n")
    shown = first.see()
    assert "the run's folder was removed: not starting it again" in shown
    assert "failed:" not in shown
    shutil.rmtree(repo.path / "checkpoints/fineweb")
    kill_all(f"SUPERVISED_BY={repo.path}/checkpoints/fineweb/.start.lock")
    shown = second.see()
    assert "the run's folder was removed: not starting it again" in shown
    assert "No such file" not in shown
    assert repo.ran == ["python train.py --resume"] * 2


@pytest.fixture
def hasty(repo: Repo) -> Repo:
    """A machine with a GPU, on which sleeping takes no time, and is written down."""
    repo.gpus("NVIDIA L4")
    repo.fake("sleep", '#!/usr/bin/env bash\necho "$*" >> "$FAKE_LOG.sleeps"\n')
    return repo


def test_a_run_that_dies_is_started_again_and_progress_counts(hasty: Repo) -> None:
    hasty.env["FAKE_ATTEMPTS"] = "0/-/KILL 0/1/1 300/-/KILL 0/-/134 0/143/1 0/-/1 0/-/1 400/-/1 0/-/0"
    result = hasty.start()
    assert result.returncode == 0, result.stdout
    assert hasty.ran == ["python train.py --resume"] * 9
    assert hasty.pauses == ["10", "20", "10", "20", "40", "80", "160", "10"]
    assert "the run died with exit code 137; newest checkpoint: none; starting it again in 10 s" in result.stdout
    assert "the run died with exit code 134; newest checkpoint: 300; starting it again in 20 s" in result.stdout
    assert hasty.log() in result.stdout


def test_after_five_deaths_without_a_new_checkpoint_it_gives_up(hasty: Repo) -> None:
    hasty.env["FAKE_ATTEMPTS"] = "200/-/KILL 200/-/KILL 0/-/1"
    result = hasty.start()
    assert result.returncode == 1
    assert len(hasty.ran) == 6
    assert "the run died 5 times in a row without a new checkpoint, now with exit code 1\n" in result.stdout


def test_waiting_in_vain_for_another_machine_is_no_death(hasty: Repo) -> None:
    machines = {"NUM_MACHINES": "2", "MACHINE_RANK": "0", "MASTER_ADDR": "a", "MASTER_PORT": "29500"}
    hasty.env |= machines | {"FAKE_ATTEMPTS": "0/-/1 " * 7 + "0/0/0"}
    result = hasty.start()  # it dies at once: not of waiting
    assert (result.returncode, len(hasty.ran)) == (1, 5), result.stdout
    shutil.rmtree(hasty.path / "checkpoints")
    Path(hasty.env["FAKE_LOG"]).unlink()
    accelerate = (hasty.tools / "accelerate").read_text()
    hasty.fake("accelerate", accelerate.replace("\n", "\nread -t 1.1 -u 3 3<><(:) || true\n", 1))  # waits
    hasty.env["MACHINES_PAUSE"] = "1"
    result = hasty.start()
    assert (result.returncode, len(hasty.ran)) == (0, 8), result.stdout
    assert "as when the other machines do not come: waiting on" in result.stdout


def test_a_launcher_that_others_stop_leaves_its_processes_three_minutes_to_save(hasty: Repo) -> None:
    supervise = ["bash", str(hasty.path / "scripts/supervise.sh"), str(hasty.path / "lock")]
    done = subprocess.run(
        [*supervise, "bash", "-c", "echo $TORCH_ELASTIC_SHUTDOWN_TIMEOUT"],
        env=hasty.env,
        capture_output=True,
        text=True,
    )
    assert (done.returncode, "\n180\n" in done.stdout) == (0, True), done.stdout


def test_a_full_disk_is_waited_for_with_pauses_up_to_ten_minutes(hasty: Repo) -> None:
    hasty.env["FAKE_ATTEMPTS"] = "0/-/6 " * 8 + "0/-/0"
    assert hasty.start().returncode == 0
    assert hasty.pauses == ["10", "20", "40", "80", "160", "320", "600", "600"]


def test_a_full_disk_is_waited_for_although_the_launcher_says_1_and_no_status_can_be_written(hasty: Repo) -> None:
    hasty.gpus(*["NVIDIA L4"] * 8)
    run = hasty.path / "checkpoints/fineweb"
    run.mkdir(parents=True)
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(run)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("a small disk cannot be mounted here")
    try:
        for name in (".start.lock", "start.log"):  # a block each, as a run has that was there before the disk was full
            (run / name).write_text("x\n")
        with contextlib.suppress(OSError), (run / "ballast").open("wb", buffering=0) as file:
            while True:
                file.write(bytes(4096))
        hasty.env["FAKE_ATTEMPTS"] = "0/-/1"
        terminal = Terminal(hasty)
        wait_until(lambda: len(hasty.ran) > 8, 30)
        (run / "ballast").unlink()
        terminal.see("died 5 times in a row without a new checkpoint, now with exit code 1\n")
        assert terminal.process.wait(10) == 1
    finally:
        kill_all(f"FAKE_LOG={hasty.env['FAKE_LOG']}")
        subprocess.run(["umount", str(run)], check=True)


UNKILLABLE = """#!/usr/bin/env bash
# None can be made here that is stuck in the driver. One that no signal reaches is found until the file is there.
if [[ $1 == -lsxzF && ! -e $FAKE_LOG.over ]]; then echo /proc/99999999/environ; else exec {grep} "$@"; fi
"""


def test_a_process_that_no_kill_ends_is_named_once_with_a_remedy_and_the_run_waits_for_its_end(hasty: Repo) -> None:
    hasty.fake("grep", UNKILLABLE.format(grep=shutil.which("grep")))
    terminal = Terminal(hasty)
    terminal.see("process 99999999 is killed and does not end")
    wait_until(lambda: len(hasty.pauses) > 30)
    assert hasty.log().count("\n") == 1
    assert "restart the machine" in hasty.log()
    assert hasty.ran == []
    Path(hasty.env["FAKE_LOG"] + ".over").touch()
    terminal.see("the run is complete")
    assert hasty.ran == ["python train.py --resume"]


def test_ctrl_c_while_a_run_waits_for_such_a_process_starts_nothing(hasty: Repo) -> None:
    hasty.fake("grep", UNKILLABLE.format(grep=shutil.which("grep")))
    terminal = Terminal(hasty)
    terminal.see("does not end")
    terminal.press_ctrl_c()
    assert "Stopped, and everything is saved" in terminal.see()
    assert (terminal.process.wait(10), hasty.ran) == (75, [])


def test_a_run_that_dies_when_it_is_saved_and_done_counts_as_it_says(hasty: Repo) -> None:
    hasty.env["FAKE_ATTEMPTS"] = "300/75/KILL"
    assert hasty.start().returncode == 75
    hasty.env["FAKE_ATTEMPTS"] = "300/0/139"
    assert hasty.start().returncode == 0


def test_a_run_whose_checkpoints_are_all_damaged_is_not_started_again(hasty: Repo) -> None:
    hasty.env["FAKE_ATTEMPTS"] = "300/-/1 -1/-/4"
    assert hasty.start().returncode == 4
    assert len(hasty.ran) == 2


@pytest.mark.parametrize("code", [2, 3, 4, 5, 7, 75])
@pytest.mark.parametrize("n_gpus", [1, 8])
def test_a_refused_or_stopped_run_is_not_started_again(hasty: Repo, code: int, n_gpus: int) -> None:
    hasty.gpus(*["NVIDIA L4"] * n_gpus)
    hasty.env["FAKE_ATTEMPTS"] = f"0/-/{code}" if n_gpus == 1 else f"0/{code}/1"  # a launcher ends with 1 in any case
    assert hasty.start().returncode == code
    assert len(hasty.ran) == 1


def test_data_that_is_refused_behind_a_checkpoint_ends_the_run_and_a_hub_that_is_away_does_not(hasty: Repo) -> None:
    hasty.env["FAKE_ATTEMPTS"] = "300/-/7 " + "0/-/7 " * 9 + "400/-/3 0/-/3 0/-/0"
    result = hasty.start()
    assert (result.returncode, len(hasty.ran)) == (3, 12), result.stdout
    assert "starting it again would not help" in result.stdout


def test_the_status_of_an_earlier_run_is_not_taken_for_this_ones(hasty: Repo) -> None:
    hasty.gpus(*["NVIDIA L4"] * 8)
    hasty.env["FAKE_ATTEMPTS"] = "0/4/1 0/-/1 0/-/0"
    assert hasty.start().returncode == 4
    assert hasty.start().returncode == 0
    assert len(hasty.ran) == 3


def test_without_a_terminal_it_runs_on_as_well_and_ends_as_the_run_does(hasty: Repo) -> None:
    hasty.env["FAKE_ATTEMPTS"] = "0/-/3"
    result = hasty.start()  # stdin is /dev/null, stdout a pipe
    assert result.returncode == 3
    assert result.stderr == "Training ended with exit code 3; the message above says why. Mend that, then: ./start.sh\n"


def test_a_reader_that_goes_away_does_not_stop_the_run(repo: Repo) -> None:
    repo.gpus("NVIDIA L4")
    repo.env |= {"FAKE_ATTEMPTS": "0/-/1 0/-/0", "RESTART_PAUSE": "1"}
    with subprocess.Popen([str(repo.path / "start.sh")], env=repo.env, stdout=subprocess.PIPE, text=True) as start:
        assert start.stdout is not None
        while "starting it again in 1 s" not in start.stdout.readline():
            assert start.poll() is None
        start.stdout.close()
        assert start.wait(10) == 141
    wait_until(lambda: "the run is complete" in repo.log())


# ---- with real training ---------------------------------------------------------------------------


@pytest.fixture
def box(tmp_path: Path) -> Iterator[Repo]:
    """The project on a machine whose GPU is a pretence: nvidia-smi and torch's count are fakes, the rest is real."""
    path, tools = tmp_path / "repo", tmp_path / "tools"
    (path / "scripts").mkdir(parents=True)
    tools.mkdir()
    for source in [*REPO.glob("*.py"), REPO / "decoding.cpp", REPO / "requirements.txt", *REPO.glob("scripts/*.py")]:
        (path / source.relative_to(REPO)).symlink_to(source)
    for name in ("start.sh", "scripts/lib.sh", "scripts/supervise.sh"):
        shutil.copy(REPO / name, path / name)
    env = os.environ | {
        "PATH": f"{tools}:{Path(sys.executable).parent}:{os.environ['PATH']}",
        "BOX": str(tmp_path),  # by which a power cut finds the processes
        "FAKE_LOG": str(tmp_path / "log"),
        "WORKSPACE": "/nowhere",
        "CUDA_VISIBLE_DEVICES": "0",
        "RESTART_PAUSE": "1",
    }
    env.pop("VIRTUAL_ENV", None)
    made = Repo(path, tools, env)
    made.gpus("NVIDIA L4")
    counted = 'case "$*" in *"import torch"*) echo "$FAKE_TORCH" ;; *)'
    made.fake("python", f'#!/usr/bin/env bash\n{counted} exec "{sys.executable}" "$@" ;; esac\n')
    torchrun = f'exec "{sys.executable}" -m torch.distributed.run --nproc_per_node 2 --standalone'
    made.fake("accelerate", f'#!/usr/bin/env bash\nwhile [[ $1 != train.py ]]; do shift; done\n{torchrun} "$@"\n')
    yield made
    kill_all(f"BOX={tmp_path}")


SMALL = "--skip-deps -- --preset smoke --train.no_compile --train.eval_every 100000 --train.warmup_tokens 0".split()


def newest_step(run: Path) -> int:
    return max((int(folder.name[5:]) for folder in run.glob("step-*")), default=0)


def status_of(run: Path) -> tuple[str, int]:
    status = json.loads((run / "status.json").read_text())
    return status["outcome"], status["step"]


@pytest.mark.slow
def test_a_box_that_loses_power_three_times_ends_its_training_by_itself_at_the_right_step(box: Repo) -> None:
    run, steps = box.path / "checkpoints/smoke", 1000
    command = [str(box.path / "start.sh"), *SMALL, "--train.max_steps", str(steps), "--train.save_every", "30"]

    def boot() -> subprocess.Popen[bytes]:
        return subprocess.Popen(command, env=box.env, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)

    saved = [0]
    mark = f"BOX={box.env['BOX']}"
    for at_any_moment in (False, True, False):  # even of its start, or soon after a checkpoint
        start = boot()
        if not at_any_moment:
            wait_until(lambda: newest_step(run) > saved[-1], 200)
        time.sleep(random.uniform(0, 6 if at_any_moment else 0.5))
        kill_all(mark)
        start.wait()
        saved.append(newest_step(run))
    assert 0 < saved[1] <= saved[2] < saved[3] < steps, saved
    start = boot()  # and an orderly shutdown, which tells every process at once
    wait_until(lambda: newest_step(run) > saved[-1], 200)
    for number in processes_with(mark):
        os.kill(number, signal.SIGTERM)
    wait_until(lambda: start.poll() is not None and not processes_with(mark), 60)
    assert status_of(run) == ("stopped", newest_step(run))
    assert boot().wait(200) == 0
    assert status_of(run) == ("complete", steps)
    metrics = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in metrics if record["kind"] == "train"] == list(range(1, steps + 1))
    assert boot().wait(200) == 0  # one boot more changes nothing
    assert newest_step(run) == steps


@pytest.mark.slow
def test_two_processes_behind_a_launcher_survive_the_death_of_either_and_stop_with_everything_saved(box: Repo) -> None:
    box.gpus("NVIDIA L4", "NVIDIA L4")
    run = box.path / "checkpoints/smoke"
    mark = f"SUPERVISED_BY={run}/.start.lock"

    def process(local_rank: int | None) -> int:
        """A process of the training; None: the launcher."""
        workers = [set(processes_with(f"LOCAL_RANK={rank}")) for rank in (0, 1)]
        if local_rank is None:
            return min(set(processes_with(mark)) - workers[0] - workers[1])
        return min(set(processes_with(mark)) & workers[local_rank])

    def wait_for_progress(start: int) -> None:
        """Until the run, started for the so-many-th time, has saved a checkpoint."""
        wait_until(lambda: (run / "start.log").exists() and box.log("smoke").count(" starting: ") == start, 200)
        before = newest_step(run)
        wait_until(lambda: newest_step(run) > before, 200)

    terminal = Terminal(box, *SMALL, "--train.max_steps", "3000", "--train.save_every", "30")
    for i, victim in enumerate((1, 0, None)):
        wait_for_progress(i + 1)
        os.kill(process(victim), signal.SIGKILL)
    wait_for_progress(4)
    terminal.press_ctrl_c()
    again = " ".join(["./start.sh", *terminal.arguments])
    assert terminal.see().endswith(f"Stopped, and everything is saved. To go on: {again}\n")
    assert terminal.process.wait(10) == 75
    assert box.log("smoke").count(" starting: ") == 4
    outcome, step = status_of(run)
    assert outcome == "stopped"
    assert step == newest_step(run)
    assert processes_with(mark) == []
