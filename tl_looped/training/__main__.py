"""Train an embedded model, or print the accuracy of one.

python -m tl_looped.training looped-hops --seed 0 --out FOLDER
python -m tl_looped.training looped-hops --evaluate FOLDER
"""

from __future__ import annotations

import argparse
import sys

import torch

from tl_looped.errors import LoopedError
from tl_looped.model import LoopedModel
from tl_looped.training.evaluate import accuracy_table, fresh_contexts
from tl_looped.training.recipes import RECIPES
from tl_looped.training.trainer import train


def main() -> int:
    """Run the command; errors of ours become one line."""
    parser = argparse.ArgumentParser(prog="python -m tl_looped.training", description=__doc__)
    parser.add_argument("model", choices=sorted(RECIPES))
    parser.add_argument("--seed", type=int, default=0, help="of weights and contexts (default 0)")
    parser.add_argument("--contexts", type=int, default=2000, help="fresh contexts to evaluate on (default 2000)")
    parser.add_argument("--threads", type=int, default=1, help="of torch: more do not help at this size (default 1)")
    action = parser.add_mutually_exclusive_group(required=True)
    action.add_argument("--out", help="train, and write the model to this new folder")
    action.add_argument("--evaluate", metavar="FOLDER", help="print the accuracy of this folder or embedded model")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    recipe = RECIPES[options.model]
    try:
        if options.out:
            train(recipe, options.seed, options.out)
        model = LoopedModel.from_pretrained(options.out or options.evaluate, device="cpu")
        table = accuracy_table(model, fresh_contexts(recipe.shuffled, options.contexts))
    except LoopedError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{options.model}: share of right answers in percent, {options.contexts} fresh contexts")
    table.iloc[:, 1:] *= 100
    print(table.to_string(float_format=lambda share: f"{share:.2f}"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
