"""start.sh with fakes first on PATH: nvidia-smi with 0, 1 or 8 GPUs, broken or hanging; python and accelerate
that write down their arguments. Nothing is installed, nothing is trained."""

from __future__ import annotations

import hashlib
import os
import shutil
import signal
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parent.parent
TOOLS = "awk bash cat cp cut dirname env getconf mkdir nproc paste rm sed sha256sum sleep sort tr uname uniq"
SAMPLE = "generate.py checkpoints/demo --prompt The people of the United States --max_tokens 100"
LAUNCH = "launch --multi_gpu --num_processes 8 --num_machines 1 --mixed_precision no --dynamo_backend no"

FAKE_PYTHON = """#!/usr/bin/env bash
case "$*" in
  *version_info*) exit "${FAKE_TOO_OLD:-0}" ;;
  *"import torch"*) echo "${FAKE_TORCH:-0 None}"; exit "${FAKE_TORCH_EXIT:-0}" ;;
  *--version*) echo "Python 3.11.7"; exit ;;
esac
echo "python $*" >> "$FAKE_LOG"
case "$*" in
  "-m venv"*) mkdir -p .venv/bin && cp "$0" .venv/bin/python ;;
  *"install"*) exit "${FAKE_PIP_EXIT:-0}" ;;
  train.py*)
    if [[ ${FAKE_TRAIN_WAITS:-} ]]; then
      for s in INT TERM; do trap "echo $s >> '$FAKE_LOG'; exit 75" $s; done
      echo training
      while :; do sleep 0.05; done
    fi
    exit "${FAKE_TRAIN_EXIT:-0}" ;;
  scripts/calc_params.py*) echo "parameters of $3 for $WORLD_SIZE" ;;
esac
"""


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
            timeout=20,
        )

    @property
    def ran(self) -> list[str]:
        """What python and accelerate were asked to do, in order."""
        log = Path(self.env["FAKE_LOG"])
        return log.read_text().splitlines() if log.exists() else []


@pytest.fixture
def repo(tmp_path: Path) -> Repo:
    path, tools = tmp_path / "a repo", tmp_path / "tools"
    (path / "scripts").mkdir(parents=True)
    tools.mkdir()
    for name in ("start.sh", "scripts/lib.sh", "requirements.txt"):
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
    made.fake("accelerate", '#!/usr/bin/env bash\necho "accelerate $*" >> "$FAKE_LOG"\n')
    made.install()
    return made


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


def test_with_one_gpu_it_becomes_the_training_process_of_the_default_run(repo: Repo) -> None:
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
    (repo.path / "scripts/calc_params.py").touch()
    result = repo.start("--dry-run")
    assert result.returncode == 0, result.stderr
    assert repo.ran == ["python scripts/calc_params.py --preset demo"]
    assert result.stdout.splitlines()[1:] == [
        "Plan:",
        "  python train.py --preset demo --resume",
        f"  python {SAMPLE}".replace("The people of the United States", "'The people of the United States'"),
        "Settings:",
        "parameters of demo for 1",
        "Nothing was started (--dry-run).",
    ]


def test_dry_run_on_eight_gpus_shows_the_launch_and_checks_settings_for_eight(repo: Repo) -> None:
    repo.gpus(*["NVIDIA L4"] * 8)
    (repo.path / "scripts/calc_params.py").touch()
    result = repo.start("--dry-run", "--", "--train.lr", "0.01")
    assert f"  accelerate {LAUNCH} train.py --resume --train.lr 0.01\n" in result.stdout
    assert "parameters of fineweb for 8\n" in result.stdout
    assert "generate.py" not in result.stdout
    assert repo.ran == ["python scripts/calc_params.py --preset fineweb --train.lr 0.01"]
    repo.start("--dry-run", "--", "--train.lr=0.02", "--preset", "gpt2")
    assert repo.ran[1:] == ["python scripts/calc_params.py --train.lr=0.02 --preset gpt2"]


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
    first = repo.start("--dry-run")
    assert first.returncode == 0, first.stderr
    assert repo.ran == ["python -m venv --clear .venv", install]
    assert repo.start("--dry-run").returncode == 0
    assert repo.ran[2:] == []
    with (repo.path / "requirements.txt").open("a") as file:
        file.write("# changed\n")
    assert repo.start("--dry-run").returncode == 0
    assert repo.ran[2:] == [install]


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
    assert "Downloads" not in repo.start("--dry-run").stdout
