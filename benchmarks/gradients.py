"""What explanations by gradients cost, against a forward and backward, and against TransformerLens.

All on an embedded model. The Jacobian lens reads the same prompts as TransformerLens's on the unrolled view, at all
places of the loops, eight rows at a time, and gives the same numbers.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import torch
from common import COLUMNS, Side, machine, parser, print_table, race, same
from transformer_lens.tools.analysis import JacobianLens

from tl_looped import LoopedModel
from tl_looped.circuits import edge_attribution
from tl_looped.lens import decompose, jacobian_lens
from tl_looped.training.variable_chains import draw_contexts

PROMPTS, ROUNDS, SKIP = 8, 5, 8


def jacobians(model: LoopedModel, texts: list[str]) -> dict[str, Side]:
    """Ours and TransformerLens's."""
    first = model.schedule.realised_depth("blocks", 0, 0)
    layers = list(range(first, model.schedule.depth - 1))
    shared: dict[str, Any] = {
        "corpus": "hops",
        "source_layers": layers,
        "skip_first_positions": SKIP,
        "show_progress": False,
    }
    ours = partial(jacobian_lens, model, texts, skip_first=SKIP, progress=False)
    theirs = partial(JacobianLens.fit, model.unrolled(model.cfg.n_loops), texts, **shared)
    same(ours().matrix.flatten(0, 1)[:-1], torch.stack([theirs().jacobians[layer] for layer in layers]))
    return {"jacobian_lens": ours, "TransformerLens's on the view": theirs}


def attributions(model: LoopedModel, texts: list[str]) -> dict[str, Side]:
    """Of the logit of one token, and of edges to it; beside one forward and backward of it."""
    tokens = model.to_tokens(texts)
    _, source = model.run_with_cache(tokens.roll(1, 0))

    def logit(logits: torch.Tensor) -> torch.Tensor:
        return logits[:, -1, 3].sum()

    def plain() -> None:
        with torch.enable_grad():
            logit(model(tokens)).backward()
        model.zero_grad()

    options: dict[str, Any] = {"targets": 3, "progress": False}
    return {
        "decompose": partial(decompose, model, tokens, **options),
        "decompose by head": partial(decompose, model, tokens, by="head", **options),
        "edge_attribution": partial(edge_attribution, model, tokens, source=source, metric=logit, progress=False),
        "forward and backward": plain,
    }


def main() -> None:
    """Print the ratios."""
    options = parser(__doc__, []).parse_args()
    torch.set_num_threads(1)
    model = LoopedModel.from_pretrained("looped-hops", device=options.device)
    contexts = draw_contexts(np.random.default_rng(0), PROMPTS, 6, 4, shuffled=True)
    texts = [contexts.text(row, 0) for row in range(PROMPTS)]
    rows = []
    for sides in (jacobians(model, texts), attributions(model, texts)):
        *names, base = sides
        result = race(sides, options.rounds or ROUNDS, options.device)
        rows += [result.row(f"looped-hops, {PROMPTS} prompts", name, base) for name in names]
    print_table(f"Time ({machine(options.device)})", COLUMNS, rows)


if __name__ == "__main__":
    main()
