"""The notebooks of demos/: `python tests/notebooks.py [NAME ...]` runs them and stores their outputs.

Each runs in a kernel of its own, offline, on one thread, in the folder demos. What is stored is what a reader sees:
no times, no ids of the machine, and a figure's data in one line.
"""

from __future__ import annotations

import json
import os
import re
import sys
from pathlib import Path
from typing import Any

import nbformat
from nbclient import NotebookClient

ROOT = Path(__file__).resolve().parents[1]
DEMOS = ROOT / "demos"
NOTEBOOKS = sorted(DEMOS.glob("*.ipynb"))
REPOSITORY = "tl-looped/tl_looped"  # on GitHub, for the links to Colab
_SETTING = {
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    "PYDEVD_DISABLE_FILE_VALIDATION": "1",
    "TQDM_DISABLE": "1",  # bars are for those who wait
    "PYTHONWARNINGS": "ignore:IProgress not found",  # tqdm's, where ipywidgets are not installed
}


def colab_link(path: Path) -> str:
    """The line that opens a notebook in Colab."""
    address = f"https://colab.research.google.com/github/{REPOSITORY}/blob/main/demos/{path.name}"
    return f"[Open in Colab]({address})"


def executed(path: Path, timeout: int = 300) -> Any:
    """A notebook with fresh outputs."""
    notebook = nbformat.read(path, as_version=4)
    os.environ.update(_SETTING)
    client = NotebookClient(
        notebook,
        timeout=timeout,
        kernel_name="python3",
        resources={"metadata": {"path": str(DEMOS)}},
        record_timing=False,
        coalesce_streams=True,  # else a print's lines come in as many pieces as the machine was busy
    )
    client.execute()
    notebook.metadata = {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }
    return notebook


def text_outputs(cell: Any) -> str:
    """What a cell printed and returned, as text."""
    parts = []
    for output in cell.get("outputs", []):
        if output["output_type"] == "stream":
            parts.append(output["text"])
        elif "text/plain" in output.get("data", {}):
            parts.append(output["data"]["text/plain"])
    return "\n".join(parts)


def store(notebook: Any, path: Path) -> None:
    """Write a notebook; every figure's data takes one line of it."""
    text = nbformat.writes(notebook)
    compact: dict[str, str] = {}
    content = json.loads(text)
    for cell in content["cells"]:
        for output in cell.get("outputs", []):
            for kind, data in output.get("data", {}).items():
                if kind.endswith("+json"):
                    mark = f"@{len(compact)}@"
                    compact[f'"{mark}"'] = json.dumps(data, separators=(",", ":"), ensure_ascii=False)
                    output["data"][kind] = mark
    text = json.dumps(content, indent=1, ensure_ascii=False)
    path.write_text(re.sub(r'"@\d+@"', lambda match: compact[match[0]], text) + "\n", encoding="utf-8")


def main() -> None:
    """Run those named, or all."""
    for path in [DEMOS / f"{name}.ipynb" for name in sys.argv[1:]] or NOTEBOOKS:
        store(executed(path), path)
        print(f"{path.name}: {path.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main()
