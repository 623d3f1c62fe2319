"""What README.md says is true: its commands run, its defaults are the code's, its links lead somewhere."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from config import PRESETS, GenerationConfig

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()

# A command of the README is run as it stands, but small: these come behind it, or in place of its own words.
SMALL = {
    "train.py": "--preset smoke --train.no_compile --train.max_steps 3 --train.warmup_tokens 0",
    "prepare_data.py": "--preset smoke --n_shards 2",
    "generate.py": "--max_tokens 5",
    "evals.py": "--sample_tokens 5",
}


def commands() -> list[str]:
    blocks = re.findall(r"```bash\n(.*?)```", README, re.DOTALL)
    lines = "".join(blocks).replace("\\\n", " ").splitlines()
    return [line.split("#")[0].strip() for line in lines if line.split("#")[0].strip()]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the commands run: beside a smoke run that is called demo, and a text of one's own."""
    folder = tmp_path_factory.mktemp("readme")
    (folder / "my.txt").write_text("\n\n".join(f"This is line {i} of my own text." for i in range(20_000)))
    run("python train.py --train.run_name demo", folder)
    return folder


def run(command: str, folder: Path) -> str:
    words = shlex.split(command)
    script = next(i for i, word in enumerate(words) if word.endswith(".py"))
    name = words[script]
    options = [*words[script + 1 :], *SMALL.get(name, "").split()]
    if name == "train.py" and "--preset" in words[script + 1 :]:  # the README's preset would train for minutes
        preset = options.index("--preset")
        del options[preset : preset + 2]
    if "LOCAL" in options:
        options += "--data.bpe_vocab_size 270 --data.val_fraction 0.2 --model.max_length 32".split()
    if name in ("train.py", "prepare_data.py"):
        options += ["--data.cache_dir", str(folder / "cache")]
    if name == "train.py" and "--train.run_name" not in options:
        options += ["--train.run_name", f"run{len(list((folder / 'checkpoints').glob('*')))}"]
    launcher = [sys.executable]
    if words[0] == "accelerate":
        launcher = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes=1", "--cpu"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*launcher, str(ROOT / name), *options],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.mark.parametrize("command", [c for c in commands() if ".py" in c])
def test_each_python_command_of_the_readme_runs(command: str, folder: Path) -> None:
    assert run(command, folder)


def test_each_script_that_the_readme_names_exists() -> None:
    names = set(re.findall(r"[\w/.]*\w+\.(?:py|sh)\b", README))
    assert len(names) > 12
    for name in names:
        assert (ROOT / name).exists(), name


def test_each_link_of_the_readme_leads_to_a_file() -> None:
    links = re.findall(r"\]\(([^)#]+)\)", README)
    assert links
    for link in links:
        assert (ROOT / link).exists(), link


def test_the_defaults_in_the_readme_are_those_of_the_code() -> None:
    default = PRESETS["fineweb"]
    rows = re.findall(r"^\| (`(?:data|model|train)\.[^|]+) \| ([^|]+) \|", README, re.MULTILINE)
    assert len(rows) >= 10
    for names, values in rows:
        fields = re.findall(r"[\w.]+", names)
        group = fields[0].split(".")[0]
        actual = [getattr(getattr(default, group), field.split(".")[-1]) for field in fields]
        flat = [v for value in actual for v in (value if isinstance(value, tuple) else (value,))]
        shown = [word.replace(",", "") for word in values.replace(", ", " ").split()]
        assert shown == [str(v) for v in flat], names


def test_the_options_of_generate_in_the_readme_have_their_defaults() -> None:
    rows = re.findall(r"^\| (`--[^|]+) \| ([^|]+) \|", README, re.MULTILINE)
    seen = 0
    for names, values in rows:
        for name, value in zip(re.findall(r"--(\w+)", names), values.split(", "), strict=True):
            if hasattr(GenerationConfig, name):  # the others are generate.py's own
                assert float(value) == getattr(GenerationConfig(), name), name
                seen += 1
    assert seen >= 8


def test_the_exit_codes_in_the_readme_are_those_of_the_code() -> None:
    from checkpoint import CheckpointError, DiskError
    from errors import ConfigError
    from hub import DataError
    from sampling import NonFiniteError
    from train import STOPPED

    table = {int(code) for code in re.findall(r"^\| (\d+) \| ", README, re.MULTILINE)}
    errors = (ConfigError, DataError, CheckpointError, NonFiniteError, DiskError)
    assert {0, STOPPED, *(error.exit_code for error in errors)} <= table
