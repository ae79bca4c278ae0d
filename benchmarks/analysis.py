"""What an analysis costs: its peak memory over 128 loops against 8, and its time against plain forwards.

Memory is the resident peak of a fresh process less what it held before the analysis began, so that the libraries and
the weights, which are the same for any number of loops, do not hide a growth. The process gives freed blocks back at
once (MALLOC_MMAP_THRESHOLD_): else the C library keeps some, more or less from run to run. Beside it the same for a
cache of the sites that the analysis reads.

The forwards that an analysis is compared with are as many as it needs: two where it compares with the last loop.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from functools import partial

import torch
from common import COLUMNS, SHAPES, Side, machine, make, parser, print_table, race

from tl_looped.attention import PATTERN_DISTANCE, PATTERN_STEP, TOTAL_VARIATION
from tl_looped.dynamics import COSINE, COSINE_TO_END, DISTANCE, STEP
from tl_looped.observe import Measure, observe
from tl_looped.stages.measures import STAGE_MEASURES

SETS: dict[str, tuple[Measure, ...]] = {
    "dynamics": (STEP, COSINE, DISTANCE, COSINE_TO_END),
    "attention stability": (PATTERN_STEP, PATTERN_DISTANCE, TOTAL_VARIATION),
    "stages": STAGE_MEASURES,
}
SETS["all of these"] = tuple(measure for measures in SETS.values() for measure in measures)
LOOPS = {"tiny": 128, "tiny-batch": 16, "small": 8}
FEW, MANY = 8, 128
_MEMORY_SHAPE = "small"


def peak(side: str, n_loops: int) -> None:
    """Print, as JSON, by how many bytes this process's memory grew at most; to be called in a process of its own."""
    shape = SHAPES[_MEMORY_SHAPE]
    torch.set_num_threads(1)
    model, _ = make(shape, torch.device("cpu"), torch.float32)
    tokens = torch.randint(shape.cfg.d_vocab, (4, 64), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        model(tokens[:, :2], 2)  # torch sets up what it needs once
        with open("/proc/self/statm") as file:
            before = int(file.read().split()[1]) * resource.getpagesize()
        if side == "cache":
            layers = [
                f"{stack}.{layer}"
                for stack in model.schedule.stacks()
                for layer in range(model.schedule.n_layers(stack))
            ]
            sites = [f"{layer}.{site}" for layer in layers for site in ("hook_resid_post", "attn.hook_pattern")]
            model.run_with_cache(tokens, n_loops, names_filter=sites)
        else:
            observe(model, tokens, n_loops, measures=SETS[side], progress=False)
    print(json.dumps(1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before))


def measured_peak(side: str, n_loops: int) -> float:
    """The same in MB, from a fresh process."""
    call = f"import analysis; analysis.peak({side!r}, {n_loops})"
    done = subprocess.run(
        [sys.executable, "-c", call],
        cwd=sys.path[0],
        env={**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"},
        check=True,
        stdout=subprocess.PIPE,
        text=True,
        timeout=900,
    )
    return json.loads(done.stdout.splitlines()[-1]) / 1e6


def main() -> None:
    """Print the ratios of memory, then those of time."""
    options = parser(__doc__, list(LOOPS)).parse_args()
    torch.set_num_threads(1)
    rows = []
    for side in (*SETS, "cache"):
        few, many = measured_peak(side, FEW), measured_peak(side, MANY)
        rows.append([side, f"{few:.0f}", f"{many:.0f}", f"{many / few:.2f}"])
    title = f"Peak memory beyond the model, {SHAPES[_MEMORY_SHAPE].describe()}, 4 x 64 tokens"
    print_table(title, ["analysis", f"{FEW} loops, MB", f"{MANY} loops, MB", "ratio"], rows)
    rows = []
    for name in options.shape:
        shape, n_loops = SHAPES[name], LOOPS.get(name, 8)
        model, tokens = make(shape, options.device, getattr(torch, options.dtype))

        def forwards(
            times: int, model: torch.nn.Module = model, tokens: torch.Tensor = tokens, n: int = n_loops
        ) -> None:
            for _ in range(times):
                model(tokens, n)

        sides: dict[str, Side] = {
            side: partial(observe, model, tokens, n_loops, measures=measures, batch_size=len(tokens), progress=False)
            for side, measures in SETS.items()
        }
        sides |= {f"{times} forwards": partial(forwards, times) for times in (1, 2)}
        result = race(sides, options.rounds or max(4, shape.rounds // 10), options.device)
        for side, measures in SETS.items():
            base = "2 forwards" if any(measure.compare == "last" for measure in measures) else "1 forwards"
            rows.append(result.row(f"{name}: {shape.describe()}, {n_loops} loops", side, base))
    print_table(f"Time ({machine(options.device)})", COLUMNS, rows)


if __name__ == "__main__":
    main()
