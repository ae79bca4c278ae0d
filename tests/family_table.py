"""The families that are registered, and how far from the numbers of their public code: in docs/models.md and README.

`python tests/family_table.py` measures and writes them; test_family_table.py checks that none is left out.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import families
import test_parity
import test_puzzles
from helpers import PARITY, expected
from torch import Tensor

from tl_looped import LoopedModel
from tl_looped.adapters import ADAPTERS, Adapter, adapter_for

ROOT = Path(__file__).parents[1]
PAGE, README = ROOT / "docs" / "models.md", ROOT / "README.md"
BEGIN, END = "<!-- parity -->\n", "<!-- end of parity -->"
ROW = re.compile(r"^\| ([\w.-]+) \| ([\w-]+) \| (\d+) \| (\S+) \| (\S+) \|$", re.MULTILINE)
# Of README: what a row is called, the families in it, what is released, and how its layers run.
GROUPS: tuple[tuple[str, tuple[str, ...], str, str], ...] = (
    ("Ouro", ("ouro",), "ByteDance/Ouro-1.4B, -2.6B, and -Thinking", "(0, 24⊗4, 0), (0, 48⊗4, 0)"),
    ("Huginn", ("huginn",), "tomg-group-umd/huginn-0125", "(2, 4⊗32, 2), injection"),
    (
        "retrofitted Llama, TinyLlama, OLMo-2",
        ("retrofit-llama", "retrofit-olmo2"),
        "smcleish/Recurrent-{Llama-3.2, TinyLlama-3T, OLMo-2-0425}-…",
        "injection",
    ),
    (
        "Llama, Mistral, Qwen2, Qwen3, OLMo-2, Gemma 2, Gemma 3, GPT-2",
        ("llama", "mistral", "qwen2", "qwen3", "olmo2", "gemma2", "gemma3", "gpt2"),
        "the hub's feedforward models, any layers looped",
        "(a, (b−a)⊗T, n−b)",
    ),
    ("nanochat", ("nanochat",), "Karpathy's, feedforward, any layers looped", "(a, (b−a)⊗T, n−b)"),
    (
        "nanochat, branch `recursive`",
        ("nanochat-recursive",),
        "small models of arXiv 2604.11791, section 5.1",
        "injection, prelude first",
    ),
    ("looped_nanochat", ("looped-nanochat",), "arXiv 2604.21106", "injection, a norm of its own each loop"),
    (
        "Base-Loop, LoopFormer",
        ("base-loop", "loopformer"),
        "arXiv 2602.11451",
        "(0, k⊗8, 0); LoopFormer's layers know the loop's time",
    ),
    ("Looped-GPT", ("looped-gpt",), "none known", "(0, k⊗T, k), a residual update, a last plain pass"),
    ("LoopUS", ("loopus",), "from Qwen3 or Llama, arXiv 2605.11011", "(p, k⊗T, c), a learned gate"),
    ("Parcae", ("parcae",), "arXiv 2604.12946", "(p, k⊗T, c), a diagonal injection, value embeddings"),
    (
        "MobileLLM",
        ("mobilellm",),
        "the form of facebook/MobileLLM-125M, layer-share or not",
        "each layer twice in a row",
    ),
    ("ALBERT", ("albert",), "the hub's, with one group of layers", "(0, k⊗N, 0), masked language model"),
    ("HRM-Text", ("hrm-text",), "sapientinc/HRM-Text-1B", "two stacks, H times (L times L_blocks, then H_blocks)"),
    (
        "HRM, TRM",
        ("hrm", "trm"),
        "puzzle solvers of arXiv 2506.21734, 2510.04871 (`tl-looped convert`)",
        "the same, no causal mask; TRM: one net in both roles",
    ),
)
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


def short_table(measured: str) -> str:
    """README's: one row for each group, with the worst error beside the largest value that `table` has of it."""
    worst: dict[str, float] = {}
    for family, *_, relative in ROW.findall(measured):
        worst[family] = max(worst.get(family, 0.0), float(relative))
    rows = [
        "| family | released checkpoints | (prelude, core ⊗ loops, coda) | worst error |",
        "| --- | --- | --- | --- |",
    ]
    for label, families_in_it, released, layout in GROUPS:
        error = max(worst[family] for family in families_in_it if family in worst)
        rows.append(f"| {label} | {released} | {layout} | {error:.1e} |")
    return "\n".join(rows) + "\n"


def between(page: Path) -> str:
    """What a page has between the marks."""
    return page.read_text(encoding="utf-8").partition(BEGIN)[2].partition(END)[0].strip("\n") + "\n"


def write(page: Path, content: str) -> None:
    """Put a table between a page's marks."""
    before, _, rest = page.read_text(encoding="utf-8").partition(BEGIN)
    page.write_text(f"{before}{BEGIN}\n{content}\n{END}{rest.partition(END)[2]}", encoding="utf-8")


if __name__ == "__main__":
    write(PAGE, table())
    write(README, short_table(between(PAGE)))
