"""The examples of README and docs print what stands under them: the same words, and numbers to the digits shown."""

import contextlib
import io
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = [path.read_text(encoding="utf-8") for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))]
BLOCK = re.compile(r"```python\n((?:(?!```).)*?)```\n\n```\n(.*?)```", re.DOTALL)
EXAMPLES = [example for page in PAGES for example in BLOCK.findall(page)]
NUMBER = re.compile(r"(?<![\w.])-?\d+(?:\.(\d+))?(?:e([-+]?\d+))?(?![\w.]*\w)")


def assert_same_output(printed: str, shown: str) -> None:
    """Word for word, but for spaces and the last digit of a number with a fraction: another processor rounds it."""
    assert NUMBER.sub("#", printed).split() == NUMBER.sub("#", shown).split()
    for ours, theirs in zip(NUMBER.finditer(printed), NUMBER.finditer(shown), strict=True):
        decimals, exponent = theirs.groups()
        last = 1.01 * 10.0 ** (int(exponent or 0) - len(decimals)) if decimals else 0.0
        assert abs(float(ours[0]) - float(theirs[0])) <= last, (ours[0], theirs[0])


def test_there_are_examples() -> None:
    assert len(EXAMPLES) >= 3


@pytest.mark.parametrize(("code", "output"), EXAMPLES)
def test_an_example_prints_what_the_readme_says(code: str, output: str) -> None:
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(code, "README.md", "exec"), {})
    assert_same_output(printed.getvalue(), output)
    assert not re.search(r"\d\.\d{5}", output)  # what a reader needs


@pytest.mark.parametrize(
    ("printed", "same"),
    [
        ("loop 3:  says 4 (0.35), 2.8e-05", True),
        ("loop 3: says 4 (0.36), 2.7e-05", False),
        ("loop 3: says 4 (0.34), 2.9e-05", False),
        ("loop 3: says 5 (0.34), 2.7e-05", False),
        ("loop 3: says c4 (0.34), 2.7e-05", False),
        ("loop 3: says 4 (0.34)", False),
    ],
)
def test_only_the_last_digit_may_differ(printed: str, same: bool) -> None:
    with contextlib.nullcontext() if same else pytest.raises(AssertionError):
        assert_same_output(printed, "loop 3: says 4 (0.34), 2.7e-05")
