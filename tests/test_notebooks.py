"""The notebooks of demos/ say what is stored in them, and are small, whole and without traces of a machine."""

from __future__ import annotations

from pathlib import Path

import nbformat
import pytest
from test_readme import assert_same_output

pytest.importorskip("ipykernel", reason="no kernel to run notebooks in: pip install '.[test]'")

from notebooks import DEMOS, NOTEBOOKS, REPOSITORY, colab_link, executed, text_outputs

EACH = [pytest.param(path, id=path.stem) for path in NOTEBOOKS]


def test_there_are_notebooks() -> None:
    assert len(NOTEBOOKS) == 8


@pytest.mark.parametrize("path", EACH)
def test_a_notebook_prints_what_is_stored(path: Path) -> None:
    stored, fresh = nbformat.read(path, as_version=4), executed(path)
    for old, new in zip(stored.cells, fresh.cells, strict=True):
        if old.cell_type != "code":
            continue
        kinds = [[{*output.get("data", {})} for output in cell.outputs] for cell in (old, new)]
        assert kinds[0] == kinds[1], old.source
        assert_same_output(text_outputs(new), text_outputs(old))


@pytest.mark.parametrize("path", EACH)
def test_a_notebook_is_fit_to_be_read(path: Path) -> None:
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    text = path.read_text(encoding="utf-8")
    assert path.stat().st_size < 1_000_000
    assert [place for place in ("/home/", "/tmp/", "/root/", str(DEMOS.parent)) if place in text] == []
    assert '"widgets"' not in text and "iopub" not in text
    first, install, *rest = notebook.cells
    assert first.source.startswith("# ") and colab_link(path) in first.source
    assert f"github.com/{REPOSITORY}" in install.source and "google.colab" in install.source
    for cell in [install, *rest]:
        for output in cell.get("outputs", []):
            assert output.output_type != "error"
            assert output.get("name") != "stderr", output.text
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
