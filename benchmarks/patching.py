"""A residual-stream sweep over (loop, layer, pos): ours against TransformerLens's on the unrolled view, and the floor.

The floor is what the needed arithmetic takes at the speed of plain batched forwards: for every (loop, layer), the layers
that come after it, on as many rows as there are positions.
"""

from __future__ import annotations

import time

import torch
from common import machine, parser, print_table
from transformer_lens.patching import generic_activation_patch, layer_pos_patch_setter

from tl_looped import LoopedModel
from tl_looped.patching import patch_sweep

CLEAN, CORRUPTED = "a=4; c=a; b=7; d=c; f=b; e=d; ? e", "a=9; c=a; b=7; d=c; f=b; e=d; ? e"


def seconds(call: object, rounds: int) -> float:
    """Median thread time of a call, in seconds."""
    times = []
    for _ in range(rounds):
        start = time.thread_time()
        call()  # type: ignore[operator]
        times.append(time.thread_time() - start)
    return sorted(times)[len(times) // 2]


def main() -> None:
    """Print the ratios for both embedded models."""
    options = parser(__doc__, []).parse_args()
    torch.set_num_threads(1)
    rounds = options.rounds or 3
    rows = []
    for name in ("looped-hops", "looped-hops-settling"):
        model = LoopedModel.from_pretrained(name, device=options.device)
        view, tokens = model.unrolled(), model.to_tokens(CORRUPTED)
        answer = model.to_single_token("4")

        def metric(logits: torch.Tensor, answer: int = answer) -> torch.Tensor:
            return logits[0, -1, answer]

        with torch.no_grad():
            _, cache = model.run_with_cache(CLEAN)
            clean = view.view(cache)

            def ours(model: LoopedModel = model, tokens: torch.Tensor = tokens, cache: object = cache) -> torch.Tensor:
                return patch_sweep(model, tokens, cache, metric, progress=False).values

            def theirs(view: object = view, tokens: torch.Tensor = tokens, clean: object = clean) -> torch.Tensor:
                sweep = generic_activation_patch(
                    view, tokens, clean, metric, layer_pos_patch_setter, "resid_pre", ("layer", "pos")
                )
                return sweep[model.cfg.n_prelude :].unflatten(0, (model.cfg.n_loops, model.cfg.n_core))

            difference = float((ours() - theirs()).abs().max())
            batch = tokens.repeat(tokens.shape[1], 1)
            forward = seconds(lambda model=model, batch=batch: model(batch), 5)
            mine, plain = seconds(ours, rounds), seconds(theirs, rounds)
        calls = model.cfg.n_loops * model.cfg.n_core
        floor = forward * sum(range(1, calls + 1)) / view.cfg.n_layers
        cells = calls * tokens.shape[1]
        rows.append(
            [name, str(cells), f"{mine:.3f}", f"{plain:.3f}", f"{plain / mine:.1f}", f"{mine / floor:.2f}", f"{difference:.1e}"]
        )
    columns = ["model", "cells", "ours, s", "TransformerLens, s", "ratio", "ours over the floor", "largest difference"]
    print_table(f"Patching sweep ({machine(options.device)})", columns, rows)


if __name__ == "__main__":
    main()
