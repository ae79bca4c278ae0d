"""The lens over loops: against runs that stop, against the equations written out, and against TransformerLens's own."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from helpers import FAMILIES, TINY, expected, make, parity, run_options, tiny, tokens_for
from torch import Tensor
from transformer_lens.tools.analysis import logit_lens as theirs_on_layers

from tl_looped import LoopedModel
from tl_looped.lens import LogitLens, logit_lens

SITES = ("resid_pre", "resid_mid", "resid_post")


def distribution(result: LogitLens) -> Tensor:
    """Probabilities of all tokens by id, of a result that kept all of them, [*axes, d_vocab]."""
    assert result.top_ids.shape[-1] == len(result.top_ids.flatten().unique())
    return torch.zeros_like(result.top_probs).scatter(-1, result.top_ids, result.top_probs)


def lens(model: LoopedModel, tokens: Any, n_loops: int | None = None, **options: Any) -> LogitLens:
    """A lens on all positions that keeps the whole distribution."""
    return logit_lens(model, tokens, n_loops, **{"positions": None, "top_k": model.cfg.d_vocab, **options})


def models() -> list[tuple[str, LoopedModel]]:
    """The parity models and the tiny ones, with their names."""
    return [(f"parity-{name}", parity(name)) for name in FAMILIES] + [(name, tiny(name)) for name in TINY]


def on(chosen: list[tuple[str, LoopedModel]]) -> pytest.MarkDecorator:
    """A test for each of some models."""
    return pytest.mark.parametrize("model", [model for _, model in chosen], ids=[name for name, _ in chosen])


every_model = on(models())
every_family = on([(name, tiny(name)) for name in TINY])


def final_norm(model: LoopedModel, x: Tensor) -> Tensor:
    """The model's last norm, written out."""
    scale = (x.double().pow(2).mean(-1, keepdim=True) + model.cfg.eps).sqrt()
    return (x.double() / scale).to(x.dtype) * model.transformer.ln_final.weight.detach()


def assert_same(found: LogitLens, wanted: LogitLens, *index: Any) -> None:
    """Measures of one result are those of another, at an index of its axes."""
    for name in ("top_probs", "top_ids", "entropy", "kl_to_final", "kl_to_previous", "target_probs", "target_ranks"):
        there = getattr(wanted, name)[index]
        torch.testing.assert_close(getattr(found, name), there, equal_nan=True, atol=1e-6, rtol=1e-4, msg=name)


# What is read.


@pytest.mark.parametrize("family", FAMILIES)
def test_exact_is_what_the_reference_code_says_after_every_loop(family: str) -> None:
    """Every measure of every loop, written out row by row from the stored logits."""
    model, stored = parity(family), expected(family)
    n_loops, target = len(stored["resid_post"]), 5
    per_loop = {int(key[8:]) - 1: stored[key] for key in stored if key.startswith("logits.T")}
    if "logits_per_iteration" in stored:
        per_loop = dict(enumerate(stored["logits_per_iteration"]))
    options = run_options(family, model)
    found = logit_lens(model, stored["input_ids"], n_loops, positions=None, targets=target, **options)
    final = per_loop[n_loops - 1].double()
    assert found.axes == ("loop", "batch", "pos") and found.entropy.shape == (n_loops, *final.shape[:2])
    for t, logits in per_loop.items():
        for row in range(final.shape[0]):
            for pos in (0, 4, 10):
                here, at = logits[row, pos].double(), (t, row, pos)
                p = (here - here.max()).exp() / (here - here.max()).exp().sum()
                last = (final[row, pos] - final[row, pos].max()).softmax(-1)
                order = sorted(range(len(p)), key=lambda i: -float(p[i]))
                assert found.top_ids[at].tolist() == order[:5]
                close = {
                    "top_probs": [float(p[i]) for i in order[:5]],
                    "entropy": -sum(float(x) * math.log(float(x)) for x in p),
                    "kl_to_final": sum(float(a) * math.log(float(a) / float(b)) for a, b in zip(last, p, strict=True)),
                    "target_probs": [float(p[target])],
                }
                for name, value in close.items():
                    assert getattr(found, name)[at].tolist() == pytest.approx(value, abs=2e-5, rel=2e-4), name
                assert found.target_ranks[at].tolist() == [order.index(target)]
                if t - 1 in per_loop:
                    before = per_loop[t - 1][row, pos].double().softmax(-1)
                    kl = sum(float(a) * math.log(float(a) / float(b)) for a, b in zip(before, p, strict=True))
                    assert float(found.kl_to_previous[at]) == pytest.approx(kl, abs=2e-5, rel=2e-4)
    assert bool(found.kl_to_previous[0].isnan().all())
    assert float(found.kl_to_final[-1].max()) < 1e-9


@every_model
def test_exact_is_a_run_that_stops_there(model: LoopedModel) -> None:
    tokens = tokens_for(model)
    found = distribution(lens(model, tokens, 4))
    with torch.no_grad():
        for t in range(4):
            torch.testing.assert_close(found[t], model(tokens, n_loops=t + 1).softmax(-1))


@every_family
@pytest.mark.parametrize("site", SITES)
def test_exact_between_layers_skips_the_rest_of_the_loop(model: LoopedModel, site: str) -> None:
    """By hand: the norm that closes a loop, then whatever the model does with a state that left one."""
    tokens = tokens_for(model)
    found = distribution(lens(model, tokens, 3, site=site))
    with torch.no_grad():
        _, cache = model.run_with_cache(tokens, 3)
        for t in range(3):
            for layer in range(model.cfg.n_core):
                state = cache[site, layer, t]
                state = final_norm(model, state) if model.cfg.loop_norm == "each" else state
                torch.testing.assert_close(found[t, layer], model.readout(state, tokens).softmax(-1))


@on([(name, tiny(name)) for name in TINY if name != "huginn"])
@pytest.mark.parametrize("site", SITES)
def test_exact_between_layers_is_a_run_whose_later_layers_write_nothing(model: LoopedModel, site: str) -> None:
    """Of a run that stops there. Huginn's layers norm the stream itself, so its silent layers still change it."""
    tokens = tokens_for(model)
    found = distribution(lens(model, tokens, 2, site=site))
    parts = [(layer, part) for layer in range(model.cfg.n_core) for part in ("attn", "mlp")]
    for t in range(2):
        for layer in range(model.cfg.n_core):
            before = {"resid_pre": 0, "resid_mid": 1, "resid_post": 2}[site]
            silent = parts[parts.index((layer, "attn")) + before :]
            hooks = [(f"blocks.{at}.loop.{t}.hook_{part}_out", lambda x, hook: 0 * x) for at, part in silent]
            with torch.no_grad():
                logits = model.run_with_hooks(tokens, t + 1, fwd_hooks=hooks)
            torch.testing.assert_close(found[t, layer], logits.softmax(-1))


@every_family
def test_direct_is_the_final_norm_and_the_head(model: LoopedModel) -> None:
    tokens = tokens_for(model)
    with torch.no_grad():
        _, cache = model.run_with_cache(tokens, 3)
        for site in SITES:
            found = distribution(lens(model, tokens, 3, kind="direct", site=site))
            for t in range(3):
                for layer in range(model.cfg.n_core):
                    wanted = (final_norm(model, cache[site, layer, t]) @ model.W_U).softmax(-1)
                    torch.testing.assert_close(found[t, layer], wanted)
        found = distribution(lens(model, tokens, 3, kind="direct"))
        for t in range(3):
            state = cache["state_post", t]
            state = state if model.cfg.loop_norm == "each" else final_norm(model, state)
            torch.testing.assert_close(found[t], (state @ model.W_U).softmax(-1))


@pytest.mark.parametrize("final", [True, False])
@pytest.mark.parametrize("loop_norm", ["none", "each"])
def test_direct_is_exact_where_no_coda_comes_between(loop_norm: str, final: bool) -> None:
    """Also where the head norms a state again that was normed at the end of its loop."""
    model = make(loop_norm=loop_norm, final_norm=final)
    tokens = tokens_for(model)
    assert_same(lens(model, tokens, 3, kind="direct"), lens(model, tokens, 3))


@on([one for one in models() if one[1].cfg.n_coda])
def test_coda_is_exact_by_its_other_name(model: LoopedModel) -> None:
    tokens = tokens_for(model)
    for options in ({}, {"site": "resid_post"}):
        assert_same(lens(model, tokens, 3, kind="coda", **options), lens(model, tokens, 3, **options))


@every_model
def test_direct_is_transformer_lenss_logit_lens_on_the_unrolled_model(model: LoopedModel) -> None:
    """Its entries are the streams that enter each layer, and the last layer's output."""
    tokens, n_loops, first = tokens_for(model), 3, model.cfg.n_prelude
    theirs = theirs_on_layers(model.unrolled(n_loops), tokens, positions=None, return_type="probs").values.detach()
    found = distribution(lens(model, tokens, n_loops, kind="direct", site="resid_pre"))
    core = theirs[first : first + n_loops * model.cfg.n_core]
    torch.testing.assert_close(found, core.unflatten(0, (n_loops, model.cfg.n_core)))
    if not model.cfg.n_coda:
        last = distribution(lens(model, tokens, n_loops, kind="direct", site="resid_post"))[-1, -1]
        torch.testing.assert_close(last, theirs[-1])
