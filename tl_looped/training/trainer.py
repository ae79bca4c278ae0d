"""A plain training loop for variable chains, a function of recipe and seed alone."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from tl_looped.adapters.saving import save, whole_folder
from tl_looped.engine.config import LoopedConfig
from tl_looped.nn import LoopedTransformer
from tl_looped.training.recipes import Rates, Recipe
from tl_looped.training.variable_chains import MAX_HOPS, Contexts, draw_contexts, draw_size, make_tokenizer

LOG_HEADER = ("step", "longest_chain", "loss_nats", "running_accuracy", "lr_factor")


def train(recipe: Recipe, seed: int, folder: Path | str, log_every: int = 25) -> LoopedTransformer:
    """Train a model and write it, with its recipe and log, to a new folder: whole, or not at all.

    The loss is the cross entropy of the answers, read after every loop, of the queries whose hops that loop has had the
    time for. The longest chain grows by one link when its running accuracy passes `recipe.promote`.

    Args:
        recipe: what to train.
        seed: of weights and contexts.
        folder: gets config.json, model.safetensors, the tokenizer, training.json and training.csv; must not exist, or
            be empty.
        log_every: steps between two lines of the log.
    """
    with whole_folder(Path(folder)) as partial:
        model = initialised(recipe.config(), seed)
        rows = _run(model, recipe, seed, log_every)
        write_trained(model, make_tokenizer(), partial, {"seed": seed, **asdict(recipe)}, [LOG_HEADER, *rows])
    return model


def write_trained(
    model: LoopedTransformer,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    recipe: dict[str, Any],
    log: Sequence[Sequence[object]],
) -> None:
    """Write model and tokenizer, the recipe as training.json and the log as training.csv, into an empty folder."""
    save(model, tokenizer, folder / "model")
    for file in (folder / "model").iterdir():
        file.rename(folder / file.name)
    (folder / "model").rmdir()
    (folder / "training.json").write_text(json.dumps(recipe, indent=1) + "\n")
    with (folder / "training.csv").open("w", newline="") as file:
        csv.writer(file).writerows(log)


def initialised(cfg: LoopedConfig, seed: int) -> LoopedTransformer:
    """The untrained model.

    Embedding N(0, 1), head N(0, 0.02²), matrices N(0, 1/fan_in), those that write to the residual stream a tenth of
    that variance, injection 0.7 times state plus input, and N(0, 0.02²).
    """
    model = LoopedTransformer(cfg)
    d_model = cfg.d_model
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim < 2:
                continue
            noise = torch.randn(weight.shape, generator=generator)
            if name == "embed.weight":
                weight.copy_(noise)
            elif name == "unembed.weight":
                weight.copy_(0.02 * noise)
            elif name == "injection.weight":
                weight.copy_(torch.cat([0.7 * torch.eye(d_model)] * 2, dim=1) + 0.02 * noise)
            else:
                writes = name.endswith(("attn.o.weight", "mlp.down.weight"))
                weight.copy_(noise * math.sqrt((0.1 if writes else 1.0) / weight.shape[1]))
    return model


def query_logits(model: LoopedTransformer, contexts: Contexts, n_loops: int) -> Float[Tensor, "loop batch query vocab"]:
    """Logits at all queries of packed contexts after every loop."""
    tokens, positions, visible = (torch.from_numpy(array) for array in contexts.packed())
    frame = model.frame(visible[None], positions[None], tokens)
    e = model.read(tokens, frame)
    state, states = torch.zeros_like(e), []
    for t in range(n_loops):
        state = model.loop(state, e, frame, t)
        states.append(state[:, -contexts.query.shape[1] :])
    return model.unembed(torch.stack(states))


def _run(model: LoopedTransformer, recipe: Recipe, seed: int, log_every: int) -> list[Sequence[object]]:
    rng = np.random.default_rng(seed)
    take_step = stepper(model, recipe)
    longest_so_far, accuracy = 1, 0.0
    rows: list[Sequence[object]] = []
    with tqdm(range(recipe.steps), desc=f"Training {recipe.name}, seed {seed}") as bar:
        for step in bar:
            n, longest = draw_size(rng, longest_so_far)
            loops = int(rng.integers(longest_so_far, longest_so_far + recipe.extra_loops + 1))
            contexts = draw_contexts(rng, recipe.batch, n, longest, recipe.shuffled)
            loss, right = _loss(model, contexts, loops)
            take_step(loss, step)
            if longest == longest_so_far:
                hardest = torch.from_numpy(contexts.hops == longest_so_far)
                accuracy = 0.95 * accuracy + 0.05 * right[hardest].float().mean().item()
            if (step + 1) % log_every == 0 or step + 1 == recipe.steps:
                bar.set_postfix(chain=longest_so_far, loss=f"{loss.item():.3f}", accuracy=f"{accuracy:.3f}")
                numbers = (f"{loss.item():.5f}", f"{accuracy:.4f}", f"{recipe.factor(step):.4f}")
                rows.append((step + 1, longest_so_far, *numbers))
            if accuracy > recipe.promote and longest_so_far < MAX_HOPS:
                longest_so_far, accuracy = longest_so_far + 1, 0.0
    return rows


def _loss(model: LoopedTransformer, contexts: Contexts, loops: int) -> tuple[Float[Tensor, ""], Tensor]:
    """Mean loss in nats over (loop, query) pairs with hops <= loop + 1, and which queries the last loop gets right."""
    logits = query_logits(model, contexts, loops)
    answer, hops = torch.from_numpy(contexts.answer), torch.from_numpy(contexts.hops)
    due = hops[None] <= torch.arange(1, loops + 1)[:, None, None]
    return F.cross_entropy(logits[due], answer.expand(loops, -1, -1)[due]), logits[-1].argmax(-1) == answer


def stepper(model: LoopedTransformer, rates: Rates) -> Callable[[Tensor, int], None]:
    """A function that takes one step, of this number, down a loss.

    Muon on the matrices inside the layers and the injection, AdamW on the rest, each with its learning rate.
    """
    plain = ("embed.weight", "unembed.weight")
    named = dict(model.named_parameters())
    matrices = [weight for name, weight in named.items() if weight.ndim == 2 and name not in plain]
    others = [weight for name, weight in named.items() if weight.ndim < 2 or name in plain]
    muon = torch.optim.Muon(matrices, lr=rates.muon_lr, momentum=0.95, weight_decay=rates.muon_decay)
    adam = torch.optim.AdamW(others, lr=rates.adam_lr, betas=(0.9, 0.98), weight_decay=0.0)

    def step(loss: Tensor, number: int) -> None:
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer, rate in ((muon, rates.muon_lr), (adam, rates.adam_lr)):
            optimizer.param_groups[0]["lr"] = rate * rates.factor(number)
            optimizer.step()
            optimizer.zero_grad()

    return step
