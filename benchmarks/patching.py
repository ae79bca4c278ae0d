"""Sweeps: ours, TransformerLens's on the unrolled view where it has one, and the floor.

The floor is what the arithmetic that no plan avoids takes at the speed of plain batched forwards: one run without a
patch, and of every cell the layers from the patched one on; where a patch acts at one position, only on the positions
from it on. With "blind" behind it all positions count. Both sides of a comparison fill the same cells.
"""

from __future__ import annotations

import statistics

import pandas as pd
import torch
from common import Race, Shape, Side, machine, make, parser, print_table, race, same
from transformer_lens.patching import PatchingResult, generic_activation_patch, layer_pos_patch_setter

from tl_looped import LoopedModel
from tl_looped.engine.cache import LoopedCache
from tl_looped.engine.config import LoopedConfig
from tl_looped.patching import patch_sweep
from tl_looped.patching.cells import Plan

CLEAN, CORRUPTED = "a=4; c=a; b=7; d=c; f=b; e=d; ? e", "a=9; c=a; b=7; d=c; f=b; e=d; ? e"
SWEEPS = [
    ("resid_pre", ("loop", "layer", "pos"), "at"),
    ("resid_pre", ("loop", "layer"), "at"),
    ("z", ("loop", "layer", "head"), "at"),
    ("pattern", ("loop", "layer", "head"), "at"),
    ("state", ("loop", "pos"), "at"),
    ("state", ("source_loop", "loop"), "at"),
    ("resid_post", ("loop", "layer"), "from"),
    ("resid_post", ("loop", "layer"), "clamp"),
]
ROWS = (4, 16, 48)
POS = 24


def looped_llama(d_model: int) -> LoopedConfig:
    """Two layers, six times."""
    heads = {"n_heads": d_model // 32, "d_head": 32, "d_mlp": 11 * d_model // 4}
    return LoopedConfig(d_model=d_model, d_vocab=1000, n_ctx=64, n_core=2, n_loops=6, final_norm=True, **heads)


def last(logits: torch.Tensor) -> torch.Tensor:
    """A metric that reads the last position."""
    return logits[0, -1, 0]


def sweeps(model: LoopedModel, tokens: torch.Tensor, cache: LoopedCache) -> dict[str, tuple[Side, float, float]]:
    """Every sweep by name, and how many whole runs its cells make: of all positions, and of those from theirs on."""
    pos, found = tokens.shape[1], {}
    for site, axes, when in SWEEPS:
        plan = Plan(model.cfg, model.cfg.n_loops, pos, site, axes, when, None)
        first = [group.first or (0, -model.cfg.n_prelude) for group in plan.groups()]
        layers = [(model.cfg.n_loops - t) * model.cfg.n_core - at + model.cfg.n_coda for t, at in first]
        runs = sum(layers) * len(plan.places()) / model.schedule.depth

        def ours(site: str = site, axes: tuple[str, ...] = axes, when: str = when) -> torch.Tensor:
            how = {"site": site, "axes": axes, "when": when, "progress": False}
            return patch_sweep(model, tokens, source=cache, metric=last, **how).values

        found[f"{site} {', '.join(axes)}, {when}"] = ours, runs, runs * ((pos + 1) / (2 * pos) if "pos" in axes else 1)
    return found


def over_floor(result: Race, name: str, runs: float) -> str:
    """Median and quartiles over rounds of a sweep's time over its floor in the same round."""
    ratios = []
    for i, ours in enumerate(result.seconds[name]):
        row = min(result.seconds[f"{rows} rows"][i] / rows for rows in ROWS)
        ratios.append(ours / (result.seconds["1 row"][i] + runs * row))
    low, middle, high = statistics.quantiles(ratios, n=4)
    return f"{middle:.2f} ({low:.2f} to {high:.2f})"


def floors(name: str, model: LoopedModel, tokens: torch.Tensor, rounds: int, device: torch.device) -> list[list[str]]:
    """Lines of the table of floors."""
    _, cache = model.run_with_cache(tokens.roll(1, 1), names_filter=lambda name: "hook_result" not in name)
    found = sweeps(model, tokens, cache)
    sides: dict[str, Side] = {sweep: side for sweep, (side, _, _) in found.items()}
    for rows in (1, *ROWS):
        batch = tokens.repeat(rows, 1)
        sides["1 row" if rows == 1 else f"{rows} rows"] = lambda batch=batch: model(batch)
    result = race(sides, rounds, device)
    lines = []
    for sweep, (_, whole, least) in found.items():
        blind = over_floor(result, sweep, whole) if whole != least else ""
        lines.append([name, sweep, f"{1e3 * result.time(sweep):.3g}", over_floor(result, sweep, least), blind])
    return lines


def against(name: str, rounds: int, device: torch.device) -> list[str]:
    """A line: one model's residual stream over the same cells, both ways."""
    model = LoopedModel.from_pretrained(name, device=device)
    view, tokens, answer = model.unrolled(), model.to_tokens(CORRUPTED), model.to_single_token("4")
    _, cache = model.run_with_cache(CLEAN)
    clean, cfg = view.view(cache), model.cfg
    core = range(cfg.n_prelude, cfg.n_prelude + cfg.n_loops * cfg.n_core)
    cells = pd.DataFrame([(layer, at) for layer in core for at in range(tokens.shape[1])], columns=["layer", "pos"])

    def metric(logits: torch.Tensor) -> torch.Tensor:
        return logits[0, -1, answer]

    def ours() -> torch.Tensor:
        return patch_sweep(model, tokens, source=cache, metric=metric, progress=False).values.flatten()

    def theirs() -> torch.Tensor:
        how = {"index_df": cells, "baseline": True}
        found = generic_activation_patch(view, tokens, clean, metric, layer_pos_patch_setter, "resid_pre", **how)
        return found.values if isinstance(found, PatchingResult) else found

    same(ours(), theirs())
    result = race({"ours": ours, "TransformerLens": theirs}, rounds, device)
    low, middle, high = result.ratio("TransformerLens", "ours")
    times = [f"{1e3 * result.time(side):.3g}" for side in ("ours", "TransformerLens")]
    return [name, str(len(cells)), *times, f"{middle:.1f} ({low:.1f} to {high:.1f})"]


def reading(rounds: int, device: torch.device) -> list[str]:
    """A line: what it saves to read out one position, at 50,000 words."""
    cfg = LoopedConfig(d_model=64, n_heads=2, d_head=32, d_mlp=176, d_vocab=50000, n_ctx=64, n_core=2, n_loops=6)
    model = LoopedModel.from_config(cfg, seed=0, device=device)
    tokens = torch.randint(cfg.d_vocab, (1, 24), generator=torch.Generator().manual_seed(0)).to(device)
    _, cache = model.run_with_cache(tokens.roll(1, 1), names_filter="hook_state_pre")

    def sweep(positions: str) -> torch.Tensor:
        how = {"site": "state", "axes": ("loop", "pos"), "progress": False, "positions": positions}
        return patch_sweep(model, tokens, source=cache, metric=last, **how).values

    same(sweep("last"), sweep("all"))
    result = race({one: lambda one=one: sweep(one) for one in ("last", "all")}, rounds, device)
    low, middle, high = result.ratio("last", "all")
    return [f"{1e3 * result.time(one):.3g}" for one in ("last", "all")] + [f"{middle:.2f} ({low:.2f} to {high:.2f})"]


def main() -> None:
    """Print the three tables."""
    options = parser(__doc__, []).parse_args()
    torch.set_num_threads(1)
    rounds, device = options.rounds or 5, options.device
    title = f"({machine(device)}, {rounds} rounds, quartiles in brackets)"
    with torch.no_grad():
        rows = [against(name, rounds, device) for name in ("looped-hops", "looped-hops-settling")]
        columns = ["model", "cells", "ours, ms", "TransformerLens, ms", "times as fast"]
        print_table(f"Residual stream {title}", columns, rows)
        columns = ["shape", "sweep", "ms", "over the floor", "over the floor of all positions"]
        rows = []
        for width in (64, 256):
            model, tokens = make(Shape(looped_llama(width), 1, POS, rounds), device, getattr(torch, options.dtype))
            rows += floors(f"2 layers x 6 loops of {width}, {POS} tokens", model, tokens, rounds, device)
        print_table(f"Over the floor {title}", columns, rows)
        print_table(f"Read-out {title}", ["last, ms", "all, ms", "ratio"], [reading(rounds, device)])


if __name__ == "__main__":
    main()
