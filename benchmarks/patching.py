"""A residual-stream sweep over (loop, layer, pos): ours, TransformerLens's on the unrolled view, and the floor.

The floor is what the needed arithmetic takes at the speed of plain batched forwards: for every (loop, layer), the
layers from it on, on as many rows as there are positions.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch
from common import machine, parser, print_table
from transformer_lens.patching import generic_activation_patch, layer_pos_patch_setter

from tl_looped import LoopedModel
from tl_looped.patching import patch_sweep

CLEAN, CORRUPTED = "a=4; c=a; b=7; d=c; f=b; e=d; ? e", "a=9; c=a; b=7; d=c; f=b; e=d; ? e"


def seconds(call: Callable[[], object], rounds: int) -> float:
    """Median thread time of a call, in seconds."""
    times = []
    for _ in range(rounds):
        start = time.thread_time()
        call()
        times.append(time.thread_time() - start)
    return statistics.median(times)


def compare(name: str, device: torch.device, rounds: int) -> list[str]:
    """A line of the table: one model's sweep, both ways."""
    model = LoopedModel.from_pretrained(name, device=device)
    view, tokens, answer = model.unrolled(), model.to_tokens(CORRUPTED), model.to_single_token("4")
    _, cache = model.run_with_cache(CLEAN)
    clean = view.view(cache)

    def metric(logits: torch.Tensor) -> torch.Tensor:
        return logits[0, -1, answer]

    def ours() -> torch.Tensor:
        return patch_sweep(model, tokens, source=cache, metric=metric, progress=False).values

    def theirs() -> torch.Tensor:
        sweep = generic_activation_patch(
            view, tokens, clean, metric, layer_pos_patch_setter, "resid_pre", ("layer", "pos")
        )
        return sweep[model.cfg.n_prelude :].unflatten(0, (model.cfg.n_loops, model.cfg.n_core))

    difference = float((ours() - theirs()).abs().max())
    batch = tokens.repeat(tokens.shape[1], 1)
    forward, mine, plain = seconds(lambda: model(batch), 5), seconds(ours, rounds), seconds(theirs, rounds)
    calls = model.cfg.n_loops * model.cfg.n_core
    floor = forward * sum(range(1, calls + 1)) / view.cfg.n_layers
    numbers = (f"{mine:.3f}", f"{plain:.3f}", f"{plain / mine:.1f}", f"{mine / floor:.2f}", f"{difference:.1e}")
    return [name, str(calls * tokens.shape[1]), *numbers]


def main() -> None:
    """Print the ratios for both embedded models."""
    options = parser(__doc__, []).parse_args()
    torch.set_num_threads(1)
    with torch.no_grad():
        rows = [compare(name, options.device, options.rounds or 3) for name in ("looped-hops", "looped-hops-settling")]
    columns = ["model", "cells", "ours, s", "TransformerLens, s", "ratio", "ours over the floor", "largest difference"]
    print_table(f"Patching sweep ({machine(options.device)})", columns, rows)


if __name__ == "__main__":
    main()
