"""Small models trained on the standard library's documentation."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

import pandas as pd
import pytest
import torch

from tl_looped import InputError, LoopedModel
from tl_looped.training import TEXT_RECIPES, train_on_text
from tl_looped.training.corpus import END, documentation, train_tokenizer
from tl_looped.training.recipes import Rates
from tl_looped.training.text import check_corpus, held_out_losses, text_loss

SMALL = {
    "d_model": 32,
    "n_heads": 2,
    "d_mlp": 48,
    "vocabulary": 300,
    "context": 16,
    "batch": 4,
    "steps": 8,
    "warmup": 2,
}


@pytest.fixture
def little(monkeypatch: pytest.MonkeyPatch) -> None:
    """A corpus that takes no time to read."""
    corpus = replace(documentation_once(), train=("The same words. " * 60,) * 3, held_out=("Other words here. " * 60,))
    monkeypatch.setattr("tl_looped.training.text.documentation", lambda: corpus)


documentation_once = lru_cache(documentation)  # reading every module takes seconds


def test_the_documentation_is_split_and_its_version_known():
    corpus = documentation_once()
    assert len(corpus.train) > 10 * len(corpus.held_out) > 0
    assert not {*corpus.train} & {*corpus.held_out}
    assert sum(map(len, corpus.train)) > 1_000_000
    assert len(corpus.digest) == 16
    assert any("regular expression" in text for text in (*corpus.train, *corpus.held_out))


def test_the_tokenizer_gives_text_back():
    texts = ("Return the absolute value.", "Ünïcode → and\n\ttabs")
    tokenizer = train_tokenizer(texts, 300)
    ids = tokenizer(texts[1])["input_ids"]
    assert ids[0] == tokenizer.bos_token_id == tokenizer.pad_token_id == tokenizer.convert_tokens_to_ids(END)
    assert tokenizer.decode(ids[1:]) == texts[1]


@pytest.mark.parametrize("name", sorted(TEXT_RECIPES))
def test_training_lowers_the_loss_and_writes_what_loads(name: str, little: None, tmp_path: Path):
    recipe = replace(TEXT_RECIPES[name], **SMALL)
    train_on_text(recipe, 0, tmp_path / "model", log_every=2)
    log = pd.read_csv(tmp_path / "model" / "training.csv")
    assert list(log["step"]) == [2, 4, 6, 8]
    assert log["loss_nats"].iloc[-1] < log["loss_nats"].iloc[0]
    about = json.loads((tmp_path / "model" / "training.json").read_text())
    assert about["seed"] == 0 and about["name"] == name and about["corpus_digest"]
    model = LoopedModel.from_pretrained(tmp_path / "model")
    losses = held_out_losses(model, context=16)
    assert losses[recipe.n_loops] == pytest.approx(log["held_out_loss_nats"].iloc[-1], rel=1e-4)
    shape = (model.cfg.n_prelude, model.cfg.n_core, model.cfg.n_coda, model.cfg.n_loops)
    assert shape == ((0, 12, 0, 1) if name == "docs-feedforward" else (2, 4, 2, 4))
    assert model.cfg.draws_state == (name == "docs-injected")


def test_a_seed_gives_the_same_model(little: None, tmp_path: Path):
    recipe = replace(TEXT_RECIPES["docs-injected"], **SMALL)
    first, second, other = (train_on_text(recipe, seed, tmp_path / str(i)) for i, seed in enumerate((0, 0, 1)))
    assert torch.equal(first.unembed.weight, second.unembed.weight)
    assert not torch.equal(first.unembed.weight, other.unembed.weight)


def test_the_loss_is_the_models_own():
    """Through LoopedModel, which masks, draws and reads out by itself."""
    recipe = replace(TEXT_RECIPES["docs-injected"], **SMALL)
    model = LoopedModel.from_config(recipe.config())
    windows = torch.randint(300, (2, 9), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        logits = model(windows[:, :-1], 3, seed=5)
        slow = torch.nn.functional.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten())
        assert float(text_loss(model.transformer, windows, 3, 5)) == pytest.approx(float(slow), rel=1e-5)


def test_held_out_texts_of_another_python_are_not_trusted(tmp_path: Path):
    corpus = documentation_once()
    check_corpus(tmp_path, corpus)  # a folder that says nothing
    (tmp_path / "training.json").write_text(json.dumps({"corpus_digest": corpus.digest}))
    check_corpus(tmp_path, corpus)
    (tmp_path / "training.json").write_text(json.dumps({"corpus_digest": "0" * 16}))
    with pytest.raises(InputError, match="was trained on the documentation 0000000000000000 of another version"):
        check_corpus(tmp_path, corpus)


def test_the_learning_rate_rises_stays_and_falls():
    rates = Rates(steps=100, decay=0.5, warmup=10)
    assert rates.factor(0) == pytest.approx(0.1)
    assert rates.factor(9) == rates.factor(30) == rates.factor(50) == 1.0
    assert rates.factor(75) == pytest.approx(1 - 0.98 / 2)
    assert rates.factor(100) == pytest.approx(0.02)
