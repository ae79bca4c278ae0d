"""The table of families in the documentation has every family that is registered, and every folder of numbers."""

from __future__ import annotations

from family_table import GROUPS, PAGE, README, ROW, between, names, short_table, without_numbers
from helpers import PARITY

from tl_looped.adapters import ADAPTERS


def test_every_family_and_every_number_is_in_the_table() -> None:
    rows = ROW.findall(between(PAGE))
    assert [(family, folder, int(count)) for family, folder, count, _, _ in rows] == names()
    assert {folder for _, folder, _ in names()} == {path.name for path in PARITY.iterdir() if path.is_dir()}
    assert all(float(relative) <= 2e-5 for *_, relative in rows)
    assert without_numbers() == NOT_STORED


def test_the_readme_has_every_family_with_its_worst_error() -> None:
    assert between(README) == short_table(between(PAGE))
    shown = {family for _, families, _, _ in GROUPS for family in families}
    known = {adapter.family for adapter in ADAPTERS} | {family for family, *_ in names()}
    assert shown == known - {"tl_looped", "raven"}  # our own format; the adapter of Huginn and the retrofitted models


NOT_STORED = {"olmo2", "tl_looped"}
"""Held to transformers itself, in test_feedforward.py; and our own format, which has no other code."""
