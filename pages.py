"""HTML pages that open anywhere without a network: the files in templates/, filled in."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from files import whole_file


def write_page(path: Path, template: str, **values: Any) -> None:
    """Write templates/<template> with these values to path. Text among them shows as text, whatever is in it."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    folder = Path(__file__).resolve().parent / "templates"
    environment = Environment(
        loader=FileSystemLoader(folder),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    page = environment.get_template(template).render(**values)
    with whole_file(path) as file:
        file.write(page.encode(errors="replace"))  # half a surrogate pair, as broken JSON has it, is no character
