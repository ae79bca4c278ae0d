"""The table of families in the documentation has every family that is registered, and every folder of numbers."""

from __future__ import annotations

import re

from family_table import BEGIN, END, PAGE, names, without_numbers
from helpers import PARITY


def test_every_family_and_every_number_is_in_the_table() -> None:
    shown = PAGE.read_text(encoding="utf-8").partition(BEGIN)[2].partition(END)[0]
    rows = re.findall(r"^\| ([\w.-]+) \| ([\w-]+) \| (\d+) \| (\S+) \| (\S+) \|$", shown, re.MULTILINE)
    assert [(family, folder, int(count)) for family, folder, count, _, _ in rows] == names()
    assert {folder for _, folder, _ in names()} == {path.name for path in PARITY.iterdir() if path.is_dir()}
    assert all(float(relative) <= 2e-5 for *_, relative in rows)
    assert without_numbers() == NOT_STORED


NOT_STORED = {"olmo2", "tl_looped"}
"""Held to transformers itself, in test_feedforward.py; and our own format, which has no other code."""
