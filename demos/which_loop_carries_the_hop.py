"""Which position carries the answer in which loop? Patching a chain of assignments in both embedded models.

    python demos/which_loop_carries_the_hop.py [--out FOLDER]

The clean and the corrupted prompt differ in one digit at the beginning of the queried chain. For every loop and
position, the state entering the loop is taken from the clean run and put into the corrupted one; the metric is how much
of the difference between the two answers comes back (0: none, 1: all). Attribution estimates the same from one backward
pass. A control changes a digit that the query does not reach.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from tl_looped import LoopedModel
from tl_looped.patching import LoopPatchingResult, attribution_sweep, patch_sweep
from tl_looped.training.variable_chains import solve

CLEAN = "a=4; c=a; b=7; d=c; f=b; e=d; ? e"
CORRUPTED = "a=9; c=a; b=7; d=c; f=b; e=d; ? e"
CONTROL = "a=4; c=a; b=3; d=c; f=b; e=d; ? e"
MODELS = ("looped-hops", "looped-hops-settling")


def recovered(model: LoopedModel, corrupted: str, attribution: bool = False) -> tuple[LoopPatchingResult, float]:
    """A sweep of the state over loops and positions, and how far apart the two runs' metrics are, in logits."""
    answer, other = model.to_single_token(solve(CLEAN)[0]), model.to_single_token(solve(CORRUPTED)[0])

    def metric(logits: torch.Tensor) -> torch.Tensor:
        return logits[0, -1, answer] - logits[0, -1, other]

    with torch.no_grad():
        logits, clean = model.run_with_cache(CLEAN)
    sweep = attribution_sweep if attribution else patch_sweep
    axes = ("loop", "pos")
    result = sweep(model, corrupted, source=clean, metric=metric, site="state", axes=axes, progress=False)
    return result, float(metric(logits) - result.baseline)


def describe(model: LoopedModel) -> tuple[LoopPatchingResult, LoopPatchingResult]:
    """Print, loop by loop, the positions whose state brings the clean answer back, measured and estimated."""
    measured, gap = recovered(model, CORRUPTED)
    estimated, _ = recovered(model, CORRUPTED, attribution=True)
    tokens = model.to_str_tokens(CLEAN)
    print(f"\n{model.cfg.model_name}: {CLEAN!r} into {CORRUPTED!r}, {gap:.1f} logits apart")
    print("state entering | positions with the largest share of the answer (measured; estimated by attribution)")
    for t in range(measured.values.shape[0]):
        shares, guesses = measured.effect()[t] / gap, estimated.effect()[t] / gap
        top = shares.abs().topk(3).indices.tolist()
        cells = [f"{p:2d} {tokens[p]!r} {shares[p]:5.2f} ({guesses[p]:5.2f})" for p in top if abs(shares[p]) >= 0.05]
        print(f"loop {t}         | " + ("   ".join(cells) or "none above 0.05"))
    ranks = torch.stack([x.effect().flatten().argsort().argsort().double() for x in (measured, estimated)])
    print(f"rank correlation of measured and estimated over all cells: {torch.corrcoef(ranks)[0, 1]:.2f}")
    control, _ = recovered(model, CONTROL)
    print(f"control {CONTROL!r}: largest change {control.effect().abs().max() / gap:.3f} of that difference")
    return measured, estimated


def main() -> None:
    """Run both models; with --out also write the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="folder for the figures, as HTML")
    options = parser.parse_args()
    for name in MODELS:
        results = describe(LoopedModel.from_pretrained(name, device="cpu"))
        if options.out:
            options.out.mkdir(parents=True, exist_ok=True)
            for result, kind in zip(results, ("patching", "attribution"), strict=True):
                result.plot().write_html(options.out / f"{name}-{kind}.html")


if __name__ == "__main__":
    main()
