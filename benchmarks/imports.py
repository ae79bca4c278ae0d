"""What `from tl_looped import LoopedModel` costs, beside transformer-lens itself; and `tl-looped --help`."""

from __future__ import annotations

import os
import subprocess
import sys

import torch
from common import COLUMNS, Race, machine, print_table

SIDES = {
    "tl_looped": ["-c", "from tl_looped import LoopedModel"],
    "transformer-lens": ["-c", "import transformer_lens"],
    "tl-looped --help": ["-m", "tl_looped", "--help"],
}


def seconds(arguments: list[str]) -> float:
    """CPU time of one process, its start included."""
    before = os.times()
    subprocess.run([sys.executable, *arguments], check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    after = os.times()
    return after.children_user + after.children_system - before.children_user - before.children_system


def main(rounds: int = 9) -> None:
    """Print the table."""
    found: dict[str, list[float]] = {name: [] for name in SIDES}
    for arguments in SIDES.values():
        seconds(arguments)  # writes compiled modules, fills the disk's cache
    for _ in range(rounds):
        for name, arguments in SIDES.items():
            found[name].append(seconds(arguments))
    rows = [Race(found).row("import", name, "transformer-lens") for name in SIDES if name != "transformer-lens"]
    print_table(f"Import, {machine(torch.device('cpu'))}", COLUMNS, rows)


if __name__ == "__main__":
    main()
