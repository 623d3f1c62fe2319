"""What a result needs beside its figures: the command, the commit, the machine, the versions."""

from __future__ import annotations

import argparse
import platform
import subprocess
import sys
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any


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
        "command": "python bench/" + " ".join([Path(sys.argv[0]).name, *sys.argv[1:]]).replace(str(Path.home()), "~"),
        "commit": git("rev-parse", "--short", "HEAD"),
        "uncommitted": bool(git("status", "--porcelain", "--untracked-files=no", "--", ":/*.py", ":/*.cpp")),
        "date": date.today().isoformat(),
        "machine": describe(torch.device("cpu")),
        "versions": {name: version(name) for name in ("torch", "pyarrow", "tiktoken", "huggingface_hub")}
        | {"python": platform.python_version()},
    }
