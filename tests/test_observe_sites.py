"""Observation of what is no layer's: states, injections, what fires once, and what the model would say."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import TINY, hook_count, make, noise_like, tiny, word_tokenizer
from torch import Tensor

from tl_looped import InputError, LoopedModel, lens
from tl_looped.lens import AGREEMENT, ENTROPY, logit_lens
from tl_looped.observe import Measure, Observed, observe

LOOPS = 3
PROMPTS = [[2, 3, 4], [5, 6, 7], [8], [9, 10, 3, 4, 6]]


def norm(x: Tensor) -> Tensor:
    return x.norm(dim=-1)


def kl(now: Tensor, other: Tensor) -> Tensor:
    return (other.exp() * (other - now)).sum(-1)


def surprise(log_probs: Tensor, next_tokens: Tensor) -> Tensor:
    said = -log_probs.gather(-1, next_tokens.clamp(min=0)[..., None])[..., 0]
    return said.masked_fill(next_tokens < 0, float("nan"))


KL_TO_FINAL = Measure("kl_to_final", "KL(last loop ‖ loop)", "nats", "readout", kl, "last", ("pos",))
KL_TO_PREVIOUS = Measure("kl_to_previous", "KL(loop before ‖ loop)", "nats", "readout", kl, "previous", ("pos",))
LOSS = Measure("loss", "loss", "nats", "readout", surprise, axes=("pos",), reads_tokens=True)
STATE = Measure("state", "‖x‖", "L2", "state_post", norm, axes=("pos",))
READS = [KL_TO_FINAL, KL_TO_PREVIOUS, LOSS, STATE]


def run(model: LoopedModel, measures: list[Measure], **options: Any) -> Observed:
    return observe(model, options.pop("prompts", PROMPTS), LOOPS, measures=measures, progress=False, **options)


def said(model: LoopedModel, prompt: list[int], n_loops: int) -> Tensor:
    """Log probabilities of a run of its own."""
    return model([prompt], n_loops)[0].log_softmax(-1)


@pytest.mark.parametrize("family", TINY)
def test_read_outs_are_those_of_shorter_runs(family: str) -> None:
    model = tiny(family, torch.float64)
    found = run(model, READS, per_token=["kl_to_final", "loss"])
    assert found.kinds == dict.fromkeys(found.values, "loop") and found.values["loss"].shape == (4, LOOPS)
    for row, prompt in enumerate(PROMPTS):
        outs = [said(model, prompt, t + 1) for t in range(LOOPS)]
        for t, out in enumerate(outs):
            to_final, loss = (found.per_token[name][row] for name in ("kl_to_final", "loss"))
            assert to_final is not None and loss is not None
            torch.testing.assert_close(to_final[t], kl(out, outs[-1]), atol=1e-10, rtol=0)
            wanted = -out[:-1].gather(-1, torch.tensor(prompt[1:])[:, None])[:, 0]
            torch.testing.assert_close(loss[t, :-1], wanted, atol=1e-10, rtol=0)
            assert bool(loss[t, -1].isnan())
            if t:
                torch.testing.assert_close(found["kl_to_previous"][row, t], kl(out, outs[t - 1]).mean())
    assert bool(found["kl_to_previous"][:, 0].isnan().all()) and hook_count(model) == 0
    # one token predicts nothing
    assert bool(found["loss"][2].isnan().all())


def test_read_outs_in_pieces_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny("huginn", torch.float64)
    whole = run(model, READS)
    monkeypatch.setattr(importlib.import_module("tl_looped.observe.batch"), "CHUNK", 1)
    pieces = run(model, READS)
    for name in whole.values:
        torch.testing.assert_close(pieces[name], whole[name], atol=1e-12, rtol=0, equal_nan=True)


@pytest.mark.parametrize("family", ["huginn", "ouro"])
def test_loops_and_what_fires_once(family: str) -> None:
    model = tiny(family)
    sites = ["state_pre", "injection", "state_post", "embed", "hook_state_init", "resid_post", "attn.hook_z"]
    measures = [Measure(site, site, "L2", site, lambda x: x.flatten(2).norm(dim=-1), axes=("pos",)) for site in sites]
    found = run(model, measures)
    for row, prompt in enumerate(PROMPTS):
        _, cache = model.run_with_cache([prompt], LOOPS)
        for site in ("state_pre", "injection", "state_post"):
            torch.testing.assert_close(found[site][row], cache.stack(site)[:, 0].norm(dim=-1).mean(-1))
            assert found.by_loop(site).shape == (LOOPS,)
        torch.testing.assert_close(found["embed"][row, 0], cache["embed"][0].norm(dim=-1).mean())
    assert found.by_loop("resid_post").shape == (LOOPS, model.cfg.n_core)
    with pytest.raises(InputError, match="'embed' reads what fires once in a run: take mean"):
        found.by_loop("embed")
    table = found.to_dataframe()
    assert len(table[table["measure"] == "state_post"]) == len(PROMPTS) * LOOPS
    assert table[table["measure"] == "embed"]["loop"].isna().all()
    assert len(found.plot("state_post").data) and "state_post" in found.plot("state_post").layout.title.text


def test_the_end_of_the_run_is_seen_once_beside_read_outs() -> None:
    """A read-out runs coda and final norm too; what is watched there is the run's own."""
    model = tiny("llama", torch.float64)
    final = Measure("final", "scale", "", "ln_final.hook_scale", lambda x: x[..., 0], axes=("pos",))
    coda = Measure("coda", "‖x‖", "L2", "resid_post", norm, axes=("pos",))
    alone, beside = run(model, [final, coda]), run(model, [final, coda, LOSS])
    for name in ("final", "coda"):
        torch.testing.assert_close(beside[name], alone[name], atol=0, rtol=0)


def test_a_measure_of_three_loops() -> None:
    model = tiny("ouro", torch.float64)
    turn = Measure("turn", "", "L2", "state_post", lambda x, a, b: norm(x - 2 * a + b), "previous_two", ("pos",))
    found = run(model, [turn])
    _, cache = model.run_with_cache([PROMPTS[0]], LOOPS)
    x = cache.stack("state_post")[:, 0]
    assert bool(found["turn"][:, :2].isnan().all())
    torch.testing.assert_close(found["turn"][0, 2], norm(x[2] - 2 * x[1] + x[0]).mean())


@dataclass
class Stop:
    """A measure that interrupts the run once, at its fifth call."""

    calls: int = 0

    def __call__(self, now: Tensor, other: Tensor) -> Tensor:
        self.calls += 1
        if self.calls == 5:
            raise KeyboardInterrupt
        return kl(now, other)


def test_a_kl_to_the_end_goes_on_after_an_interruption(tmp_path: Path) -> None:
    model, path, stop = tiny("llama", torch.float64), tmp_path / "kl.safetensors", Stop()
    measure = Measure("kl", "", "nats", "readout", stop, "last", ("pos",))
    with pytest.raises(KeyboardInterrupt):
        run(model, [measure], batch_size=1, save_to=path)
    assert int(Observed.load(path).done.sum()) == 1
    found = run(model, [measure], batch_size=1, save_to=path)
    assert bool(found.done.all()) and stop.calls == 5 + 3 * LOOPS
    torch.testing.assert_close(found["kl"], run(model, [KL_TO_FINAL])["kl_to_final"], atol=1e-12, rtol=0)


def test_padding_is_cut_off() -> None:
    model = make(tokenizer=word_tokenizer(), **TINY["llama"])
    texts = ["a b c", "d"]
    wanted = run(model, READS, prompts=[[2, 3, 4], [5]])
    for side in ("left", "right"):
        found = run(model, READS, prompts=texts, padding_side=side)
        for name in found.values:
            torch.testing.assert_close(found[name], wanted[name], atol=0, rtol=0, equal_nan=True)


def test_given_states_and_positions_follow_their_rows() -> None:
    model = tiny("llama", torch.float64)
    prompts = torch.tensor([[2, 3, 4], [5, 6, 7]])
    mask = torch.tensor([[0, 1, 1], [1, 1, 1]])
    state = noise_like(torch.zeros(2, 3, model.cfg.d_model, dtype=torch.float64))
    positions = torch.tensor([[0, 3, 4], [0, 2, 5]])
    runs = model.prepare(prompts, LOOPS, attention_mask=mask, initial_state=state, position_ids=positions)
    found = observe(model, runs, measures=[STATE], progress=False)
    _, cache = model.run_with_cache(runs)
    x = cache.stack("state_post").norm(dim=-1)
    torch.testing.assert_close(found["state"][0], x[:, 0, 1:].mean(-1))
    torch.testing.assert_close(found["state"][1], x[:, 1].mean(-1))


def test_what_can_not_be_observed() -> None:
    model = tiny("ouro")
    with pytest.raises(InputError, match="an observation looks at whole runs: leave out start_at_loop and stop_at"):
        observe(model, model.prepare(PROMPTS, LOOPS, stop_at_loop=1), measures=[STATE])
    with pytest.raises(InputError, match="measure 'loss' reads 'readout': read-outs by loop are those of a looped"):
        observe(model.unrolled(2), [[1, 2]], measures=[LOSS])
    with pytest.raises(InputError, match="observe has no argument 'sed'. Nearest: 'seed'"):
        observe(model, PROMPTS, measures=[STATE], sed=3)


@pytest.mark.parametrize("family", TINY)
def test_the_lens_over_many_prompts_is_the_lens(family: str) -> None:
    """The same numbers from the lens on one prompt, and as statistics over many."""
    model = tiny(family, torch.float64)
    measures = [ENTROPY, lens.KL_TO_FINAL, lens.KL_TO_PREVIOUS, AGREEMENT, lens.LOSS]
    found = run(model, measures)
    for row, prompt in enumerate(PROMPTS):
        one = logit_lens(model, torch.tensor([prompt]), LOOPS, positions=None)
        for name in ("entropy", "kl_to_final", "kl_to_previous"):
            wanted = getattr(one, name)[:, 0].mean(-1)
            torch.testing.assert_close(found[name][row], wanted, atol=1e-10, rtol=0, equal_nan=True)
        top = one.top_ids[:, 0, :, 0]
        torch.testing.assert_close(found["agreement"][row], (top == top[-1]).double().mean(-1))
        if len(prompt) > 1:
            losses = [model(torch.tensor([prompt]), t + 1, return_type="loss") for t in range(LOOPS)]
            torch.testing.assert_close(found["loss"][row], torch.stack(losses), atol=1e-10, rtol=0)


def test_a_read_out_that_overflows_is_not_left_out_of_a_mean() -> None:
    """Every state is finite, the logits are not: the mean over the other tokens would be a number, and wrong."""
    model = make(**TINY["ouro"])
    with torch.no_grad():
        model.transformer.unembed.weight[3] = 3e38
    with pytest.raises(InputError, match="prompt 0: activations are not finite, from 'loop.0.readout', the log prob"):
        run(model, [LOSS], prompts=[[2, 3, 4]])
    assert bool(run(model, [STATE], prompts=[[2, 3, 4]])["state"].isfinite().all())
