"""The tuned lens: it starts as the direct lens, is never worse on its training texts, and finds what can be found."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache
from typing import Any

import pytest
import torch
from helpers import TINY, WORDS, hook_count, make, tiny, tokens_for, word_tokenizer
from torch import Tensor

from tl_looped import InputError, LoopedModel
from tl_looped.lens import LogitLens, TunedLens, fit_tuned_lens, logit_lens
from tl_looped.observe import batch

every_family = pytest.mark.parametrize("family", TINY)
MEASURES = ("top_probs", "top_ids", "entropy", "kl_to_final", "kl_to_previous", "target_probs", "target_ranks")
QUICK = {"steps": 6, "batch_size": 4, "learning_rate": 1e-2, "progress": False}


def fit(model: LoopedModel, texts: Any = None, n_loops: int | None = 3, **options: Any) -> TunedLens:
    """A quick fit on random tokens."""
    texts = tokens_for(model, batch=10, pos=3) if texts is None else texts
    return fit_tuned_lens(model, texts, n_loops, **{**QUICK, **options})


@lru_cache
def fitted(family: str, site: Any = "resid_post", per_loop: bool = False) -> TunedLens:
    return fit(tiny(family), site=site, per_loop=per_loop)


def kl_by_hand(model: LoopedModel, tokens: Tensor, lens: TunedLens, loop: int, layer: int, tuned: bool) -> float:
    """Mean KL(run ‖ lens) over all tokens, row by row in float64, from a full cache."""
    with torch.no_grad():
        sites = f"hook_{lens.site}", "hook_state_post"
        logits, cache = model.run_with_cache(tokens, lens.n_loops, names_filter=lambda name: name.endswith(sites))
    final = logits.double().log_softmax(-1)
    states = cache["state_post", loop] if lens.site == "state" else cache[lens.site, layer, loop]
    total = 0.0
    for row in range(len(tokens)):
        for pos in range(tokens.shape[1]):
            x = states[row, pos].double()
            if tuned:
                at = (loop if lens.per_loop else 0, lens.layers.index(layer))
                x = x + x @ lens.weight[at].double() + lens.bias[at].double()
            if not (lens.site == "state" and model.cfg.loop_norm == "each"):
                x = x / (x.pow(2).mean() + model.cfg.eps).sqrt() * model.transformer.ln_final.weight.detach()
            q = (x @ model.W_U.detach().double()).log_softmax(-1)
            total += float((final[row, pos].exp() * (final[row, pos] - q)).sum())
    return total / tokens.numel()


def assert_same(found: LogitLens, wanted: LogitLens) -> None:
    for name in MEASURES:
        torch.testing.assert_close(getattr(found, name), getattr(wanted, name), equal_nan=True, msg=name)


# What it promises.


@every_family
def test_with_translators_of_zero_it_is_the_direct_lens(family: str) -> None:
    model = tiny(family)
    for site, per_loop in (("resid_post", True), ("state", False)):
        lens = fitted(family, site, per_loop)
        zero = replace(lens, weight=torch.zeros_like(lens.weight), bias=torch.zeros_like(lens.bias))
        options = {"site": site, "positions": None}
        tokens = tokens_for(model)
        found = logit_lens(model, tokens, 3, kind="tuned", translator=zero, **options)
        assert_same(found, logit_lens(model, tokens, 3, kind="direct", **options))
        assert found.made_by["kind"] == "tuned"


@every_family
@pytest.mark.parametrize("per_loop", [False, True])
def test_it_is_never_worse_than_direct_on_its_training_texts(family: str, per_loop: bool) -> None:
    lens = fitted(family, "resid_post" if per_loop else "state", per_loop)
    losses = lens.tuned_loss, lens.direct_loss
    tuned, direct = losses if per_loop else (loss.mean(0, keepdim=True) for loss in losses)
    assert bool((tuned <= direct).all()) and bool(lens.kept.any())
    assert torch.equal(lens.kept, tuned < direct)
    assert bool((lens.weight[~lens.kept] == 0).all()) and bool((lens.bias[~lens.kept] == 0).all())


@pytest.mark.parametrize(
    ("family", "site", "per_loop"),
    [("ouro", "state", False), ("ouro", "resid_post", True), ("huginn", "resid_mid", False)],
)
def test_its_losses_are_those_of_a_slow_computation(family: str, site: Any, per_loop: bool) -> None:
    """On both parts: every fifth text is held out."""
    model, lens = tiny(family), fitted(family, site, per_loop)
    tokens = tokens_for(model, batch=10, pos=3)
    held = torch.tensor([4, 9])
    trained = torch.tensor([i for i in range(10) if i not in (4, 9)])
    assert (lens.made_by["prompts"], lens.made_by["held_out_prompts"]) == (8, 2)
    for rows, direct, tuned in (
        (trained, lens.direct_loss, lens.tuned_loss),
        (held, lens.held_out_direct_loss, lens.held_out_tuned_loss),
    ):
        for loop in (0, 2):
            for layer in lens.layers:
                index = loop, lens.layers.index(layer)
                by_hand = [kl_by_hand(model, tokens[rows], lens, loop, layer, which) for which in (False, True)]
                assert [float(direct[index]), float(tuned[index])] == pytest.approx(by_hand, rel=1e-3, abs=1e-6)


@pytest.mark.parametrize("per_loop", [False, True])
def test_a_lens_reads_through_its_translators(per_loop: bool) -> None:
    """The mean KL of `logit_lens` on a text is what the fit would report for it, also of some layers and loops."""
    model, lens = tiny("llama"), fitted("llama", "resid_post", per_loop)
    tokens = tokens_for(model, seed=9)
    found = logit_lens(model, tokens, 3, kind="tuned", translator=lens, site="resid_post", positions=None)
    for loop in range(3):
        for layer in range(2):
            wanted = kl_by_hand(model, tokens, lens, loop, layer, tuned=True)
            assert float(found.kl_to_final[loop, layer].mean()) == pytest.approx(wanted, rel=1e-3)
    options = {"kind": "tuned", "translator": lens, "site": "resid_post"}
    part = logit_lens(model, tokens, 3, layers=[1], loops=[2], positions=[-1, 0], **options)
    torch.testing.assert_close(part.kl_to_final[0, 0], found.kl_to_final[2, 1][:, [-1, 0]])
    torch.testing.assert_close(part.kl_to_previous[0, 0], found.kl_to_previous[2, 1][:, [-1, 0]])


def test_a_translator_that_exists_is_found() -> None:
    """With layers that write nothing, the state is W [x; e] again and again: linear in e, so in the state before."""
    model = make(injection="concat_linear", n_core=1, n_loops=2, d_model=4, n_heads=1, tie_embeddings=True, d_vocab=12)
    with torch.no_grad():
        for block in model.transformer.blocks:
            block.attn.o.weight.zero_()
            block.mlp.down.weight.zero_()
    tokens = tokens_for(model, batch=20, pos=12)
    lens = fit(model, tokens, 2, per_loop=True, site="state", steps=150, batch_size=16, learning_rate=5e-2)
    assert float(lens.held_out_direct_loss[0, 0]) > 0.02
    assert float(lens.held_out_tuned_loss[0, 0]) < 0.02 * float(lens.held_out_direct_loss[0, 0])
    assert float(lens.direct_loss[1, 0]) == pytest.approx(0, abs=1e-6)  # the last state is what the head reads


# How it is fitted.


def test_one_that_diverges_is_set_back() -> None:
    lens = fit(tiny("llama"), learning_rate=1e30)
    assert not bool(lens.kept.any())
    assert bool((lens.weight == 0).all()) and bool((lens.bias == 0).all())
    assert torch.equal(lens.tuned_loss, lens.direct_loss)
    assert torch.equal(lens.held_out_tuned_loss, lens.held_out_direct_loss)
    assert bool(lens.direct_loss.isfinite().all())


def test_the_seed_sets_the_order_of_texts_and_the_model_is_left_alone() -> None:
    model = tiny("ouro")
    before = [weight.clone() for weight in model.parameters()]
    first, again, other = (fit(model, order_seed=seed) for seed in (1, 1, 2))
    assert torch.equal(first.weight, again.weight) and torch.equal(first.tuned_loss, again.tuned_loss)
    assert not torch.equal(first.weight, other.weight)
    assert all(torch.equal(*pair) for pair in zip(before, model.parameters(), strict=True))
    assert all(weight.grad is None and weight.requires_grad for weight in model.parameters())
    assert hook_count(model) == 0
    assert not first.weight.requires_grad


def test_pieces_of_the_vocabulary_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny("huginn")
    whole = fit(model)
    monkeypatch.setattr(batch, "CHUNK", 5 * model.cfg.d_vocab)
    pieces = fit(model)
    torch.testing.assert_close(pieces.weight, whole.weight, atol=1e-4, rtol=1e-3)
    torch.testing.assert_close(pieces.held_out_tuned_loss, whole.held_out_tuned_loss, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_is_not_fitted(side: Any) -> None:
    """The loss on texts of several lengths is the mean over their real tokens."""
    model = make(tokenizer=word_tokenizer(), **{**TINY["ouro"], "d_vocab": len(WORDS)})
    texts = ["a b c d e", "f", "g h"]
    lens = fit(model, texts, None, held_out=["a b", "c"], padding_side=side, layers=[1])
    wanted = torch.zeros(2)
    for text in texts:
        tokens = model.to_tokens(text)
        by_hand = [kl_by_hand(model, tokens, lens, 1, 1, tuned) for tuned in (False, True)]
        wanted += torch.tensor(by_hand) * tokens.numel() / 8
    assert [float(lens.direct_loss[1, 0]), float(lens.tuned_loss[1, 0])] == pytest.approx(wanted.tolist(), rel=1e-3)
    assert (lens.made_by["prompts"], lens.made_by["held_out_prompts"], lens.layers) == (3, 2, (1,))


def test_in_bfloat16_it_is_fitted_in_float32() -> None:
    model = tiny("llama", torch.bfloat16)
    lens = fit(model)
    assert lens.weight.dtype == torch.float32 and bool(lens.kept.any())
    found = logit_lens(model, tokens_for(model), 3, kind="tuned", translator=lens, site="resid_post")
    assert bool(found.kl_to_final.isfinite().all())


def test_its_table_and_figure() -> None:
    lens = fitted("ouro", "resid_post", True)
    table = lens.to_dataframe()
    assert len(table) == 3 * 2
    row = table[(table["loop"] == 2) & (table["layer"] == 1)].iloc[0]
    assert row["held_out_tuned_loss"] == pytest.approx(float(lens.held_out_tuned_loss[2, 1]))
    assert row["direct_loss"] == pytest.approx(float(lens.direct_loss[2, 1]))
    assert row["kept"] == bool(lens.kept[2, 1])
    lines = {line["name"]: line["y"] for line in lens.plot().to_dict()["data"]}
    assert lines["layer 1, tuned"] == pytest.approx(lens.held_out_tuned_loss[:, 1].tolist(), rel=1e-4)
    assert lines["layer 0, direct"] == pytest.approx(lens.held_out_direct_loss[:, 0].tolist(), rel=1e-4)


# What it refuses.


def test_a_translator_of_another_model_loop_count_site_or_layer() -> None:
    model, tokens = tiny("ouro"), tokens_for(tiny("ouro"))
    lens = fit(model, layers=[1])
    options: dict[str, Any] = {"kind": "tuned", "translator": lens, "site": "resid_post", "layers": [1]}
    logit_lens(model, tokens, 3, **options)
    with pytest.raises(
        InputError, match="fitted on custom with other weights than this custom: fit one with fit_tuned"
    ):
        logit_lens(make(**{**TINY["ouro"], "n_core": 2, "d_mlp": 16}), tokens, 3, **options)
    changed = make(**TINY["ouro"])
    with torch.no_grad():
        changed.transformer.blocks[0].mlp.up.weight[0, 0] += 0.1
    with pytest.raises(InputError, match="with other weights"):
        logit_lens(changed, tokens, 3, **options)
    with pytest.raises(InputError, match="fitted on runs of 3 loops, this one has 4: pass n_loops=3, or fit one with"):
        logit_lens(model, tokens, 4, **options)
    with pytest.raises(InputError, match="reads 'resid_post', not 'resid_mid': pass site='resid_post'"):
        logit_lens(model, tokens, 3, **{**options, "site": "resid_mid"})
    with pytest.raises(InputError, match=r"has the layers \[1\], not \[0\]"):
        logit_lens(model, tokens, 3, **{**options, "layers": [0, 1]})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prompts": "a"}, "at least 5 prompts .every fifth is held out., or one or more with held_out=..., got 1"),
        ({"prompts": ["a", "b", "c", "d"]}, "at least 5 prompts .*, got 4"),
        ({"prompts": torch.arange(12)}, "at least 5 prompts .*, got 1"),
        ({"prompts": [], "held_out": ["a"]}, "there are no prompts"),
        ({"held_out": []}, "there are no prompts"),
        ({"steps": 0}, "steps must be at least 1, got 0"),
        ({"batch_size": 2.5}, "batch_size must be an integer, got 2.5"),
        ({"learning_rate": 0.0}, "learning_rate must be a finite number above 0, got 0.0"),
        ({"learning_rate": float("inf")}, "learning_rate must be a finite number above 0, got inf"),
        ({"order_seed": -1}, "order_seed must be at least 0, got -1"),
        ({"seed": -1}, "seed must be an integer of at least 0, got -1"),
        ({"site": "mlp_out"}, "site must be one of 'state', 'resid_pre', 'resid_mid', 'resid_post', got 'mlp_out'"),
        ({"layers": [2]}, r"layer 2 is out of range: 2 exist"),
        ({"layers": 1}, r"layers must be indices, such as \[0, -1\], got 1"),
        ({"site": "state", "layers": [0]}, "the state leaves the whole loop, not a layer"),
        ({"n_loops": 0}, "n_loops must be at least 1, got 0"),
        ({"held_out": ["not a word"]}, "the model's tokenizer can't read"),
    ],
)
@pytest.mark.usefixtures("as_a_user")
def test_bad_input_is_refused_before_the_first_run(options: dict[str, Any], message: str) -> None:
    model = make(tokenizer=word_tokenizer(), **{**TINY["ouro"], "d_vocab": len(WORDS)})
    ran: list[str] = []
    hook = ("hook_embed", lambda x, hook: ran.append(hook.name))
    with model.hooks([hook]), pytest.raises(InputError, match=message):
        fit_tuned_lens(model, **{"prompts": ["a", "b", "c", "d", "e"], "progress": False, **options})
    assert ran == []
