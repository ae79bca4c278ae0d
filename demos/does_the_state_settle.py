"""Do the embedded models come to rest? How far each loop moves the query's state, and where its heads look.

    python demos/does_the_state_settle.py

One hundred fresh questions of six hops for each model, run for 32 loops.
"""

from __future__ import annotations

import numpy as np
import torch

from tl_looped import LoopedModel
from tl_looped.training import RECIPES
from tl_looped.training.variable_chains import draw_contexts

HOPS, PROMPTS, LOOPS = 6, 100, 32
SHOWN = (1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 12, 16, 24, 31)


def questions(shuffled: bool) -> list[str]:
    """Prompts of 16 assignments whose query is six hops away."""
    contexts = draw_contexts(np.random.default_rng(123), PROMPTS, 16, HOPS, shuffled)
    return [contexts.text(row, int(np.argmax(contexts.hops[row] == HOPS))) for row in range(PROMPTS)]


def report(name: str) -> None:
    """Print, for some loops, the relative step of the query's state and the change of its attention."""
    model = LoopedModel.from_pretrained(name, device="cpu")
    with torch.no_grad():
        filters = ["hook_state_post", *(f"blocks.{layer}.attn.hook_pattern" for layer in range(model.cfg.n_core))]
        _, cache = model.run_with_cache(questions(RECIPES[name].shuffled), LOOPS, names_filter=filters, pos_slice=-1)
    state = cache.stack("state_post")[:, :, 0]
    step = (state[1:] - state[:-1]).norm(dim=-1) / state[1:].norm(dim=-1)
    print(f"\n{name}: {PROMPTS} questions, {HOPS} hops away; loops count from 0")
    print("loop                                " + " ".join(f"{t:6d}" for t in SHOWN))
    for share in (0.5, 0.95):
        values = step.quantile(share, dim=1)
        print(f"step of the state, {share:.0%} quantile".ljust(36) + " ".join(f"{values[t - 1]:6.3f}" for t in SHOWN))
    for layer in range(model.cfg.n_core):
        pattern = cache.stack("pattern", layer)[:, :, :, 0]
        change = ((pattern[1:] - pattern[:-1]).abs().sum(-1) / 2).mean((1, 2))  # total variation, mean over heads
        line = " ".join(f"{change[t - 1]:6.3f}" for t in SHOWN)
        print(f"change of attention, layer {layer}".ljust(36) + line)


if __name__ == "__main__":
    torch.set_num_threads(1)
    for model_name in RECIPES:
        report(model_name)
