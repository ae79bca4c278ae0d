"""The families that are registered, and how far from the numbers of their public code: the table of docs/models.md.

`python tests/family_table.py` measures and writes it; test_family_table.py checks that none is left out.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import families
import test_parity
import test_puzzles
from helpers import PARITY, expected
from torch import Tensor

from tl_looped import LoopedModel
from tl_looped.adapters import ADAPTERS, Adapter, adapter_for

PAGE = Path(__file__).parents[1] / "docs" / "models.md"
BEGIN, END = "<!-- parity -->\n", "<!-- end of parity -->"
HEAD = "| family | numbers of | stored numbers compared | worst absolute error | of the largest value |"


def compared() -> dict[str, tuple[list[str], Callable[[str, str], Tensor]]]:
    """Folder of `tests/parity` -> its keys that are compared, and what gives ours."""
    found: dict[str, tuple[list[str], Callable[[str, str], Tensor]]] = {}
    suites = [(test_parity.stored, test_parity.ours), (families.STORED, families.ours)]
    for stored, ours in [*suites, (test_puzzles.stored, test_puzzles.ours)]:
        for folder, key in stored:
            found.setdefault(folder, ([], ours))[0].append(key)
    return found


def adapter_of(folder: str) -> Adapter:
    """The adapter that loads a folder."""
    return adapter_for(json.loads((PARITY / folder / "config.json").read_text(encoding="utf-8")))


def without_numbers() -> set[str]:
    """Families whose adapter loads no folder of numbers."""
    used = [adapter_of(folder) for folder in compared()]
    return {adapter.family for adapter in ADAPTERS if adapter not in used}


def names() -> list[tuple[str, str, int]]:
    """(family, folder, how many keys are compared), in the order of the adapters."""
    folders = sorted(compared(), key=lambda folder: (ADAPTERS.index(adapter_of(folder)), folder))
    family = {folder: LoopedModel.from_pretrained(PARITY / folder).cfg.family for folder in folders}
    return [(family[folder], folder, len(compared()[folder][0])) for folder in folders]


def errors(folder: str) -> tuple[float, float]:
    """The largest error of a folder, and the largest beside the largest value of its tensor (1 where that is less)."""
    keys, ours = compared()[folder]
    absolute = relative = 0.0
    for key in keys:
        wanted = expected(folder)[key]
        error = float((ours(folder, key) - wanted).abs().max())
        absolute, relative = max(absolute, error), max(relative, error / max(1.0, float(wanted.abs().max())))
    return absolute, relative


def table() -> str:
    """Markdown, one row for each folder."""
    rows = [HEAD, "| --- | --- | --- | --- | --- |"]
    for family, folder, count in names():
        absolute, relative = errors(folder)
        rows.append(f"| {family} | {folder} | {count} | {absolute:.1e} | {relative:.1e} |")
    return "\n".join(rows) + "\n"


if __name__ == "__main__":
    text = PAGE.read_text(encoding="utf-8")
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    PAGE.write_text(f"{before}{BEGIN}\n{table()}\n{END}{after}", encoding="utf-8")
