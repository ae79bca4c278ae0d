"""What a Jacobian lens costs: the time of ours against TransformerLens's on the unrolled view, the same numbers.

Both read the same prompts of an embedded model, all places of the loops, eight rows at a time.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import torch
from common import COLUMNS, Side, machine, parser, print_table, race, same
from transformer_lens.tools.analysis import JacobianLens

from tl_looped import LoopedModel
from tl_looped.lens import jacobian_lens
from tl_looped.training.variable_chains import draw_contexts

PROMPTS, ROUNDS, SKIP = 8, 5, 8


def main() -> None:
    """Print the ratio."""
    options = parser(__doc__, []).parse_args()
    torch.set_num_threads(1)
    model = LoopedModel.from_pretrained("looped-hops", device=options.device)
    view = model.unrolled(model.cfg.n_loops)
    contexts = draw_contexts(np.random.default_rng(0), PROMPTS, 6, 4, shuffled=True)
    texts = [contexts.text(row, 0) for row in range(PROMPTS)]
    first = model.schedule.realised_depth("blocks", 0, 0)
    layers = list(range(first, model.schedule.depth - 1))
    shared: dict[str, Any] = {
        "corpus": "hops",
        "source_layers": layers,
        "skip_first_positions": SKIP,
        "show_progress": False,
    }
    ours = partial(jacobian_lens, model, texts, skip_first=SKIP, progress=False)
    theirs = partial(JacobianLens.fit, view, texts, source_layers=layers, **shared)
    same(ours().matrix.flatten(0, 1)[:-1], torch.stack([theirs().jacobians[layer] for layer in layers]))
    sides: dict[str, Side] = {"jacobian_lens": ours, "TransformerLens's on the view": theirs}
    result = race(sides, options.rounds or ROUNDS, options.device)
    rows = [result.row(f"looped-hops, {PROMPTS} prompts", *sides)]
    print_table(f"Time ({machine(options.device)})", COLUMNS, rows)


if __name__ == "__main__":
    main()
