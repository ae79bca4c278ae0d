"""What caching costs: ours against a plain forward that forms its attention patterns step by step."""

from __future__ import annotations

from functools import partial

import torch
from common import COLUMNS, SHAPES, Side, machine, make, parser, print_table, race, same
from plain import Plain


def main() -> None:
    """Print the ratios; the first row of each shape is the goal's, the others say what else costs."""
    options = parser(__doc__, ["tiny", "tiny-batch", "small", "ouro-1.4b-2layers"]).parse_args()
    torch.set_num_threads(1)
    base = "plain, explicit patterns"
    rows = []
    for name in options.shape:
        shape = SHAPES[name]
        model, tokens = make(shape, options.device, getattr(torch, options.dtype))
        plain, state = Plain.of(model, shape.pos, explicit=True), model.batch(tokens).state
        given = {"initial_state": state} if shape.cfg.draws_state else {}
        sites, layers = ("hook_resid_post", "attn.hook_pattern"), range(shape.cfg.n_core)
        goal = [f"blocks.{layer}.{site}" for layer in layers for site in sites]
        filters = {
            "cache resid_post and pattern": {"names_filter": goal},
            "cache one site": {"names_filter": "blocks.0.hook_resid_post"},
            "cache the last loop": {"names_filter": goal, "loops": [-1]},
            "cache everything": {},
        }
        with torch.no_grad():
            same(model(tokens, **given), plain(tokens, shape.cfg.n_loops, state))
        sides: dict[str, Side] = {
            side: partial(model.run_with_cache, tokens, **kept, **given) for side, kept in filters.items()
        }
        sides[base] = partial(plain, tokens, shape.cfg.n_loops, state)
        result = race(sides, options.rounds or max(6, shape.rounds // 2), options.device)
        rows += [result.row(f"{name}: {shape.describe()}", side, base) for side in filters]
    print_table(f"Caching ({machine(options.device)})", COLUMNS, rows)


if __name__ == "__main__":
    main()
