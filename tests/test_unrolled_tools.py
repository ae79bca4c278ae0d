"""Every tool of TransformerLens on the view of every form of model: right, or refused, as the documentation says."""

from __future__ import annotations

from functools import lru_cache

import pytest
from unrolled_tools import FORMS, PAGE, TOOLS, outcome


@lru_cache
def documented() -> dict[str, dict[str, str]]:
    rows = [line.strip("| \n").split(" | ") for line in PAGE.read_text().splitlines() if line.startswith("|")]
    return {row[0].strip("`"): dict(zip(FORMS, row[1:], strict=True)) for row in rows[2:]}


@pytest.mark.usefixtures("as_a_user")
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("tool", TOOLS)
def test_a_tool_is_right_or_refuses(tool: str, form: str) -> None:
    found = outcome(TOOLS[tool], form)
    assert found.split(":")[0] == documented()[tool][form], found


def test_no_tool_is_documented_that_is_not_checked() -> None:
    assert list(documented()) == list(TOOLS)
