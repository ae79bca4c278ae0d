"""Every tool of TransformerLens on the view of every form of model: right, or refused, as the documentation says."""

from __future__ import annotations

from functools import lru_cache

import pytest
from unrolled_tools import FORMS, PAGE, STORED, TOOLS, outcome


@lru_cache
def documented() -> dict[str, dict[str, str]]:
    """Form -> tool -> what the page says."""
    rows = [line.strip("| \n").split(" | ") for line in PAGE.read_text().splitlines() if line.startswith("|")]
    refusing = {row[0]: set(row[1].split(", ")) for row in rows[2:]}
    assert all(name in TOOLS for row in refusing.values() for name in row - {"none"})
    return {form: {tool: "refuses" if tool in names else "right" for tool in TOOLS} for form, names in refusing.items()}


@pytest.mark.usefixtures("as_a_user")
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("form", [*FORMS, *STORED])
@pytest.mark.parametrize("tool", TOOLS)
def test_a_tool_is_right_or_refuses(tool: str, form: str) -> None:
    found = outcome(TOOLS[tool], form)
    assert found.split(":")[0] == documented()[form][tool], found


def test_no_form_is_documented_that_is_not_checked() -> None:
    assert list(documented()) == [*FORMS, *STORED]
