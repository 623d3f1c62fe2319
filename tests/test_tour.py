"""What docs/tour.md says is true: its commands, run in order, print what it shows."""

from __future__ import annotations

import functools
import importlib
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
TOUR = (ROOT / "docs" / "tour.md").read_text()
TOLERANCE = 0.02  # of figures with a decimal point, such as losses: other processors round otherwise
FIGURE = r"(?<![\w.])-?\d+\.\d+"

parts = re.split(r"^## (.+)\n", TOUR, flags=re.MULTILINE)[1:]
CHAPTERS = {  # title: its blocks, each some commands and what they print, if it is shown
    title: re.findall(r"```bash\n(.*?)```(?:\n+```text\n(.*?)```)?", text, re.DOTALL)
    for title, text in zip(parts[::2], parts[1::2], strict=True)
}
(FUNCTIONS, _), *BEGINNING = CHAPTERS.pop("Before you start")


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the project's scripts, where the tour's first run has been trained, as all chapters expect."""
    folder = tmp_path_factory.mktemp("clone")
    for file in [*ROOT.glob("*.py"), ROOT / "decoding.cpp", ROOT / "LICENSE"]:
        shutil.copy(file, folder)
    for commands, shown in BEGINNING:
        follow(commands, shown, folder)
    return folder


def follow(commands: str, shown: str, folder: Path) -> None:
    """Run commands as a learner would, in bash behind the tour's functions, and compare."""
    places = {"HOME": str(folder / "home"), "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    done = subprocess.run(
        ["bash", "-c", f"set -eo pipefail\n{FUNCTIONS}\n{commands}"],
        cwd=folder,
        env=os.environ | places | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, f"{commands}\n{done.stdout}"
    wrong = difference(shown, done.stdout)
    assert not wrong, f"{wrong}\n--- commands\n{commands}--- the tour shows\n{shown}--- they print\n{done.stdout}"


def difference(shown: str, printed: str) -> str:
    """What is not as shown; empty when all is. "..." stands for anything in a line, or as a line for any lines.

    The width of blanks does not count. Figures with a decimal point may differ by TOLERANCE or their last digit by one.
    """
    pattern, figures = "", []
    for line in shown.splitlines():
        if line == "...":
            pattern += r"(?:.*\n)*?"
            continue
        for part in re.split(rf"(\.\.\.|\s+|{FIGURE})", line.rstrip()):
            if part == "...":
                pattern += ".*"
            elif part.isspace():
                pattern += " +"
            elif re.fullmatch(FIGURE, part):
                pattern += f"({FIGURE})"
                figures.append(part)
            else:
                pattern += re.escape(part)
        pattern += " *\n"
    match = re.fullmatch(pattern or r"(?:.*\n?)*", printed)
    if not match:
        return "the text differs"
    wrong = [
        f"{got} instead of {figure}"
        for figure, got in zip(figures, match.groups(), strict=True)
        if abs(float(got) - float(figure)) > max(TOLERANCE * abs(float(figure)), 1.01 * last_place(figure))
    ]
    return ", ".join(wrong)


def last_place(figure: str) -> float:
    """One unit of the last digit shown: 0.001 of "0.011", 0.0001 of "1.2e-03"."""
    digits, _, exponent = figure.lower().partition("e")
    return float(10.0 ** (int(exponent or 0) - len(digits.partition(".")[2])))


def trains(blocks: list[tuple[str, str]]) -> bool:
    return any(re.search(r"^run ", commands, re.MULTILINE) for commands, _ in blocks)


@pytest.mark.parametrize(
    "title",
    [pytest.param(t, marks=pytest.mark.slow if trains(blocks) else ()) for t, blocks in CHAPTERS.items() if blocks],
)
def test_each_command_of_a_chapter_prints_what_the_tour_shows(title: str, clone: Path) -> None:
    for commands, shown in CHAPTERS[title]:
        follow(commands, shown, clone)


@pytest.mark.parametrize(
    ("printed", "is_right"),
    [
        ("a  x\nfirst | loss 2.03 | 7\nz\n", True),
        ("a  x\nb\nc\nfirst | loss 1.97 | 7\nz\n", True),
        ("a  x\nfirst | loss 2.06 | 7\nz\n", False),  # a figure too far off
        ("a  x\nfirst | loss 2.00 | 8\nz\n", False),  # a count
        ("a  x\nsecond | loss 2.00 | 7\nz\n", False),  # another order
        ("a  x\nfirst | loss 2.00 | 7\n", False),  # a line too few
        ("a  x\nfirst | loss nan | 7\nz\n", False),
    ],
)
def test_another_output_than_the_tours_is_noticed(printed: str, is_right: bool) -> None:
    assert (difference("a ...\n...\nfirst | loss 2.00 | 7\nz\n", printed) == "") is is_right


def test_every_name_that_the_tour_points_at_is_in_the_code() -> None:
    modules = "|".join(path.stem for path in ROOT.glob("*.py"))
    names = set(re.findall(rf"`((?:{modules})\.(?!(?:py|cpp)\b)\w+(?:\.\w+)*)`", TOUR))
    assert len(names) > 25
    for name in names:
        module, *attributes = name.split(".")
        assert functools.reduce(getattr, attributes, importlib.import_module(module)) is not None


@pytest.mark.parametrize("page", ["docs/tour.md", "docs/design.md", "CONTRIBUTING.md"])
def test_the_links_and_files_of_a_page_are_there(page: str) -> None:
    path, text = ROOT / page, (ROOT / page).read_text()
    links = re.findall(r"\]\(([^)#:]+)\)", text)
    assert links
    for link in links:
        assert (path.parent / link).exists(), link
    for name in set(re.findall(r"(?:\b(?:tests|bench|scripts|docs|results)/)?\b\w+\.(?:py|sh)\b", text)):
        assert (ROOT / name).exists() or (ROOT / "scripts" / name).exists(), name
