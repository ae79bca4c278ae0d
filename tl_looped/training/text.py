"""Small language models trained on text: looped with and without injection, and a feedforward control."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from tl_looped.adapters.saving import whole_folder
from tl_looped.engine.config import LoopedConfig
from tl_looped.engine.errors import InputError
from tl_looped.engine.state import own_state
from tl_looped.model import LoopedModel, one_core
from tl_looped.nn import LoopedTransformer
from tl_looped.training.corpus import Corpus, documentation, train_tokenizer
from tl_looped.training.recipes import Rates
from tl_looped.training.trainer import initialised, stepper, write_trained

LOG_HEADER = ("step", "loss_nats", "held_out_loss_nats", "lr_factor")


@dataclass(frozen=True, kw_only=True)
class TextRecipe(Rates):
    """A (p, k⊗T, c) model with pre-norm, trained on the standard library's documentation at a constant loop count.

    Attributes:
        name: of the model.
        n_prelude, n_core, n_coda, n_loops: its layers and loops; a feedforward model has one loop.
        injected: whether every loop mixes in the prelude's output and starts from a random state.
        d_model, n_heads, d_mlp: its width.
        vocabulary: tokens of the tokenizer, which is trained on the same text.
        context: tokens of a training window.
        batch: windows in a step.
    """

    name: str
    n_prelude: int = 2
    n_core: int = 4
    n_coda: int = 2
    n_loops: int = 4
    injected: bool = False
    d_model: int = 128
    n_heads: int = 4
    d_mlp: int = 344
    vocabulary: int = 2048
    context: int = 128
    batch: int = 16
    steps: int = 800
    decay: float = 0.5

    def config(self) -> LoopedConfig:
        """The paper's models trained from scratch (its section 5.1), by default a quarter as wide."""
        injected = {
            "injection": "concat_linear",
            "state_init": "truncated_normal",
            "state_init_std": (2 / (5 * self.d_model)) ** 0.5,
        }
        return LoopedConfig(
            d_model=self.d_model,
            n_heads=self.n_heads,
            d_head=self.d_model // self.n_heads,
            d_mlp=self.d_mlp,
            d_vocab=self.vocabulary,
            n_ctx=4 * self.context,
            n_prelude=self.n_prelude,
            n_core=self.n_core,
            n_coda=self.n_coda,
            n_loops=self.n_loops,
            eps=1e-5,
            model_name=self.name,
            family="documentation",
            **(injected if self.injected else {}),
        )


_LOOPED = TextRecipe(name="docs-looped")
TEXT_RECIPES = {
    recipe.name: recipe
    for recipe in (
        _LOOPED,
        replace(_LOOPED, name="docs-injected", injected=True),
        replace(_LOOPED, name="docs-feedforward", n_prelude=0, n_core=12, n_coda=0, n_loops=1),
    )
}


def train_on_text(recipe: TextRecipe, seed: int, folder: Path | str, log_every: int = 50) -> LoopedTransformer:
    """Train a model and write it, with its recipe and log, to a new folder: whole, or not at all.

    The loss is the next-token cross entropy after the last loop, over windows drawn at random places of the text.

    Args:
        recipe: what to train.
        seed: of weights, windows and initial states.
        folder, log_every: as in `train`.
    """
    with whole_folder(Path(folder)) as partial:
        corpus = documentation()
        tokenizer = train_tokenizer(corpus.train, recipe.vocabulary)
        model = initialised(recipe.config(), seed)
        rows = _run(model, recipe, seed, corpus, tokenizer, log_every)
        about = {"seed": seed, "corpus_digest": corpus.digest, **asdict(recipe)}
        write_trained(model, tokenizer, partial, about, [LOG_HEADER, *rows])
    return model


def text_loss(
    model: LoopedTransformer, windows: Int[Tensor, "batch pos"], n_loops: int, seed: int | None
) -> Float[Tensor, ""]:
    """Mean next-token cross entropy after the last loop, in nats; the initial state is drawn from `seed`, or afresh."""
    tokens, targets = windows[:, :-1], windows[:, 1:]
    positions = torch.arange(tokens.shape[1]).expand_as(tokens)
    frame = model.frame(None, positions[:1], tokens)
    state = own_state(model.cfg, positions, seed, torch.float32)
    logits = model.readout(model(tokens, frame, state, 0, n_loops), frame)
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


def check_corpus(folder: Path | str, corpus: Corpus) -> None:
    """An error unless a trained model's text is this one: of another, what was held out is not known.

    Raises:
        InputError: the folder's training.json names another text, as another version of Python has.
    """
    about = Path(folder) / "training.json"
    digest = json.loads(about.read_text(encoding="utf-8")).get("corpus_digest") if about.exists() else None
    if digest is not None and digest != corpus.digest:
        raise InputError(
            f"{str(folder)!r} was trained on the documentation {digest} of another version of Python, this one has "
            f"{corpus.digest}: what was held out then may be other text now. Train it here, or use that version."
        )


@torch.no_grad()
def held_out_losses(
    model: LoopedModel, seed: int = 0, loops: Sequence[int] = (1, 2, 3, 4, 6, 8, 16, 32), context: int = 128
) -> dict[int, float]:
    """Next-token loss in nats by loop count, on documentation that training has not seen; one loop without a loop."""
    if model.tokenizer is None:
        raise InputError(f"{model.cfg.model_name} has no tokenizer, so its loss on text can't be measured.")
    windows = _windows(_stream(model.tokenizer, documentation().held_out), context)
    counts = loops if model.cfg.n_loops > 1 else (1,)
    return {n: float(text_loss(one_core(model), windows, n, seed)) for n in counts}


def _run(
    model: LoopedTransformer,
    recipe: TextRecipe,
    seed: int,
    corpus: Corpus,
    tokenizer: PreTrainedTokenizerBase,
    log_every: int,
) -> list[Sequence[object]]:
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)  # the initial states of training are drawn afresh in every step
    stream, held_out = (_stream(tokenizer, texts) for texts in (corpus.train, corpus.held_out))
    tests = _windows(held_out, recipe.context)
    take_step = stepper(model, recipe)
    rows: list[Sequence[object]] = []
    with tqdm(range(recipe.steps), desc=f"Training {recipe.name}, seed {seed}") as bar:
        for step in bar:
            starts = torch.randint(len(stream) - recipe.context, (recipe.batch, 1), generator=generator)
            loss = text_loss(model, stream[starts + torch.arange(recipe.context)], recipe.n_loops, None)
            take_step(loss, step)
            if (step + 1) % log_every == 0 or step + 1 == recipe.steps:
                with torch.no_grad():
                    test = text_loss(model, tests, recipe.n_loops, seed)
                bar.set_postfix(loss=f"{loss.item():.3f}", held_out=f"{test.item():.3f}")
                rows.append((step + 1, f"{loss.item():.5f}", f"{test.item():.5f}", f"{recipe.factor(step):.4f}"))
    return rows


def _windows(stream: Int[Tensor, " token"], context: int, most: int = 32) -> Int[Tensor, "batch pos"]:
    """The first windows of a stream, one after the other."""
    return stream[: len(stream) // context * context].view(-1, context)[:most]


def _stream(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> Int[Tensor, " token"]:
    return torch.tensor([token for text in texts for token in tokenizer(text)["input_ids"]])
