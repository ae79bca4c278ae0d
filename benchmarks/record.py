"""What recording costs: rows a second against plain hooks that write the same, and memory by number of prompts."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from itertools import count
from pathlib import Path

import torch
from common import COLUMNS, SHAPES, Shape, machine, make, parser, print_table, race
from safetensors.torch import load_file, save_file

from tl_looped import LoopedModel
from tl_looped.record import record

BATCHES = 24
MEMORY = (128, 512, 2048)  # prompts
PEAK = """
import sys, torch
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from common import SHAPES, make
from tl_looped.record import record
def used(name):
    return next(int(line.split()[1]) for line in Path("/proc/self/status").open() if line.startswith(name))
torch.set_num_threads(1)
model, _ = make(SHAPES["tiny-batch"], torch.device("cpu"), torch.float32)
options = {"batch_size": 64, "shard_bytes": 2**24, "progress": False, "sites": ["resid_post", "state_post"]}
tokens = torch.randint(41, (int(sys.argv[2]), 48))
record(model, tokens[:64], out=sys.argv[3] + "-warm", **options)
Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
before = used("VmRSS")
record(model, tokens, out=sys.argv[3], **options)
print(used("VmHWM") - before)
"""


def plainly(model: LoopedModel, tokens: torch.Tensor, names: list[str], out: Path, batch: int) -> None:
    """What a person would write: a hook on each site that keeps its tensor, and a file for every batch."""
    out.mkdir()
    for i, rows in enumerate(tokens.split(batch)):
        kept: dict[str, torch.Tensor] = {}
        hooks = [(name, lambda x, hook: kept.__setitem__(hook.name, x.flatten(0, 1).cpu())) for name in names]  # noqa: B023
        model.run_with_hooks(rows, fwd_hooks=hooks, return_type=None)
        save_file(kept, out / f"{i:03}.safetensors")


def rate(name: str, shape: Shape, rounds: int | None, device: torch.device, dtype: torch.dtype, folder: Path) -> list:
    """A line for a shape."""
    model, _ = make(shape, device, dtype)
    draw = torch.Generator().manual_seed(0)
    tokens = torch.randint(shape.cfg.d_vocab, (BATCHES * shape.batch, shape.pos), generator=draw).to(device)
    names = [f"blocks.{layer}.hook_resid_post" for layer in range(shape.cfg.n_core)]
    number = count()

    def ours() -> None:
        out = folder / f"{name}-ours-{next(number)}"
        options = {"batch_size": shape.batch, "shard_bytes": 2**26, "progress": False}
        record(model, tokens, sites="resid_post", out=out, **options)

    def plain() -> None:
        plainly(model, tokens, names, folder / f"{name}-plain-{next(number)}", shape.batch)

    result = race({"record": ours, "plain hooks": plain}, rounds or 5, device)
    same(folder, name, names[0])
    rows = tokens.numel()
    print(f"{name}: {rows / result.time('record'):,.0f} rows a second, plain {rows / result.time('plain hooks'):,.0f}")
    return result.row(f"{name}: {BATCHES} batches of {shape.describe()}", "record", "plain hooks")


def same(folder: Path, name: str, site: str) -> None:
    """Raise unless both wrote the same bits."""
    place = site.replace(".hook", ".loop.0.hook")
    ours, plain = (
        torch.cat([load_file(path)[place] for path in sorted(next(folder.glob(f"{name}-{side}-*")).glob("*.safe*"))])
        for side in ("ours", "plain")
    )
    if not torch.equal(ours, plain):
        raise AssertionError("record and the plain loop wrote different activations")


def main() -> None:
    """Print rates, ratios and peaks."""
    options = parser(__doc__, ["tiny-batch", "small"]).parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as temporary:
        folder, dtype = Path(temporary), getattr(torch, options.dtype)
        rows = [rate(name, SHAPES[name], options.rounds, options.device, dtype, folder) for name in options.shape]
        print_table(f"Recording resid_post of all loops ({machine(options.device)})", COLUMNS, rows)
        peaks = []
        for prompts in MEMORY:
            command = [sys.executable, "-c", PEAK, str(Path(__file__).parent), str(prompts), str(folder / str(prompts))]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            peaks.append([f"{prompts:,}", f"{int(done.stdout) / 1024:.0f}"])
        print_table(
            "Peak memory above what was used before (Linux), shards of 16 MB", ["prompts of 48 tokens", "MB"], peaks
        )


if __name__ == "__main__":
    main()
