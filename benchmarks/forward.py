"""What hook points cost where nobody hooks: our forward against plain models of the same weights."""

from __future__ import annotations

from functools import partial
import torch
from common import COLUMNS, SHAPES, make, machine, parser, print_table, race, same
from plain import Plain

def main() -> None:
    options = parser(__doc__, ["tiny", "tiny-batch", "small", "ouro-1.4b-2layers"]).parse_args()
    torch.set_num_threads(1)
    rows = []
    for name in options.shape:
        shape = SHAPES[name]
        model, tokens = make(shape, options.device, getattr(torch, options.dtype))
        plain = Plain.of(model, shape.pos)
        state = model.prepare(tokens).state
        n = shape.cfg.n_loops
        with torch.no_grad():
            same(model(tokens, initial_state=state), plain(tokens, n, state))
        result = race({"tl_looped": lambda: model(tokens, initial_state=state), "plain PyTorch": lambda: plain(tokens, n, state)}, options.rounds or shape.rounds, options.device)
        rows.append(result.row(f"{name}: {shape.describe()}", "tl_looped", "plain PyTorch"))
    print_table(f"Forward without hooks ({machine(options.device)})", COLUMNS, rows)

main()
