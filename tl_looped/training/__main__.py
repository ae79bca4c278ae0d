"""Train a small model, or print how good one is.

python -m tl_looped.training looped-hops --seed 0 --out FOLDER
python -m tl_looped.training looped-hops --evaluate FOLDER
python -m tl_looped.training docs-looped --seed 0 --steps 5000 --out FOLDER
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from typing import TypeVar

import torch

from tl_looped.engine.errors import InputError, LoopedError, check_count
from tl_looped.model import LoopedModel
from tl_looped.training.corpus import documentation
from tl_looped.training.evaluate import accuracy_table, fresh_contexts
from tl_looped.training.recipes import RECIPES, Rates
from tl_looped.training.text import TEXT_RECIPES, check_corpus, held_out_losses, train_on_text
from tl_looped.training.trainer import train

AnyRates = TypeVar("AnyRates", bound=Rates)


def main() -> int:
    """Run the command; errors of ours become one line."""
    parser = argparse.ArgumentParser(prog="python -m tl_looped.training", description=__doc__)
    parser.add_argument("model", choices=sorted({*RECIPES, *TEXT_RECIPES}))
    parser.add_argument("--seed", type=int, default=0, help="of weights and data (default 0)")
    parser.add_argument("--steps", type=int, help="of training (as many as the recipe says)")
    parser.add_argument("--d-model", type=int, help="width of a text model (128)")
    parser.add_argument("--contexts", type=int, default=2000, help="fresh contexts to evaluate on (default 2000)")
    parser.add_argument("--threads", type=int, default=1, help="of torch: more help only wider models (default 1)")
    action = parser.add_mutually_exclusive_group(required=True)
    action.add_argument("--out", help="train, and write the model to this new folder")
    action.add_argument("--evaluate", metavar="FOLDER", help="print how good this folder or embedded model is")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    try:
        table = _text(options) if options.model in TEXT_RECIPES else _chains(options)
    except LoopedError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(table)
    return 0


def _chains(options: argparse.Namespace) -> str:
    recipe = RECIPES[options.model]
    if options.d_model is not None:
        raise InputError(f"--d-model is for text models ({', '.join(TEXT_RECIPES)}), not for {options.model}.")
    if options.out:
        train(_with_steps(recipe, options.steps), options.seed, options.out)
    model = LoopedModel.from_pretrained(options.out or options.evaluate, device="cpu")
    table = accuracy_table(model, fresh_contexts(recipe.shuffled, options.contexts))
    table.iloc[:, 1:] *= 100
    shown = table.to_string(float_format=lambda share: f"{share:.2f}")
    return f"{options.model}: share of right answers in percent, {options.contexts} fresh contexts\n{shown}"


def _text(options: argparse.Namespace) -> str:
    recipe = TEXT_RECIPES[options.model]
    if options.d_model is not None:
        n_heads = check_count("--d-model", options.d_model, minimum=32) // 32
        recipe = replace(recipe, d_model=32 * n_heads, n_heads=n_heads, d_mlp=8 * round(32 * n_heads / 3))
    if options.out:
        train_on_text(_with_steps(recipe, options.steps), options.seed, options.out)
    check_corpus(options.out or options.evaluate, documentation())
    model = LoopedModel.from_pretrained(options.out or options.evaluate, device="cpu", dtype=torch.float32)
    losses = held_out_losses(model, options.seed)
    rows = "\n".join(f"{n:5d}  {loss:.4f}" for n, loss in losses.items())
    return f"{options.model}: next-token loss in nats on held-out documentation\nloops  loss\n{rows}"


def _with_steps(recipe: AnyRates, steps: int | None) -> AnyRates:
    return recipe if steps is None else replace(recipe, steps=check_count("--steps", steps))


if __name__ == "__main__":
    sys.exit(main())
