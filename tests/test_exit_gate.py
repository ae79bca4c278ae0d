"""Ouro's exit gate: as tensor functions, and against what the reference code computed."""

from __future__ import annotations

from functools import lru_cache

import pytest
import torch
from helpers import expected, parity, tiny, tokens_for
from torch import Tensor

from tl_looped import InputError, LoopedModel
from tl_looped.engine.hooks import LoopHookPoint
from tl_looped.lens import ExitTrace, GateRule, trace_exits
from tl_looped.lens.exits import exit_distribution, threshold_exit, weighted_logits

NAN = float("nan")
ouros = pytest.mark.parametrize("family", ["ouro", "ouro-gqa"])


# The gate, as tensors.


def test_the_exit_distribution_in_closed_form() -> None:
    """A gate that opens with chance 1/2 at every loop stops after 1/2, 1/4, 1/8, and the last takes 1/8."""
    halves = [0.5, 0.25, 0.125, 0.125]
    assert exit_distribution(torch.zeros(4, 1, 1)).flatten().tolist() == pytest.approx(halves)
    assert exit_distribution(torch.zeros(1, 2)).tolist() == [[1.0, 1.0]]
    assert exit_distribution(torch.tensor([100.0, 0.0, 0.0])).tolist() == [1.0, 0.0, 0.0]
    assert exit_distribution(torch.tensor([-200.0, -200.0, 50.0])).tolist() == [0.0, 0.0, 1.0]


@pytest.mark.parametrize("shape", [(6,), (6, 3), (6, 2, 4)])
def test_the_exit_distribution_loop_by_loop(shape: tuple[int, ...]) -> None:
    gate = 3 * torch.randn(shape)
    found = exit_distribution(gate)
    left = torch.ones(shape[1:])
    for t in range(5):
        chance = gate[t].sigmoid()
        torch.testing.assert_close(found[t], left * chance)
        left = left * (1 - chance)
    torch.testing.assert_close(found[5], left)
    torch.testing.assert_close(found.sum(0), torch.ones(shape[1:]))
    half = exit_distribution(gate.bfloat16())
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, exit_distribution(gate.bfloat16().float()))


def test_a_threshold_is_first_reached() -> None:
    distribution = torch.tensor([[0.5, 0.1], [0.25, 0.2], [0.25, 0.7]])
    for threshold, wanted in (
        (0.5, [0, 2]),
        (0.51, [1, 2]),
        (0.05, [0, 0]),
        (0.3, [0, 1]),
        (1, [2, 2]),
        (0.76, [2, 2]),
    ):
        assert threshold_exit(distribution, threshold).tolist() == wanted
    below = torch.tensor([0.3, 0.3, 0.3])  # a sum that rounding left below the threshold still ends at the last loop
    assert int(threshold_exit(below, 1.0)) == 2
    for wrong in (0.0, -0.1, 1.01, NAN):
        with pytest.raises(InputError, match="gate: the threshold"):
            threshold_exit(distribution, wrong)


def test_weighted_logits_are_a_mean_of_loops() -> None:
    logits, distribution = torch.randn(3, 2, 4, 7), torch.rand(3, 2, 4).softmax(0)
    wanted = torch.zeros(2, 4, 7)
    for t in range(3):
        for row in range(2):
            for pos in range(4):
                wanted[row, pos] += distribution[t, row, pos] * logits[t, row, pos]
    torch.testing.assert_close(weighted_logits(logits, distribution), wanted)
    certain = torch.zeros(3, 2, 4)
    certain[1] = 1
    assert torch.equal(weighted_logits(logits, certain), logits[1])


@pytest.mark.usefixtures("as_a_user")
@pytest.mark.parametrize("shape", [(3,), (3, 4), (2, 2, 4), (3, 2, 4, 7)])
def test_a_distribution_over_something_else_is_not_stretched(shape: tuple[int, ...]) -> None:
    with pytest.raises(InputError, match=r"logits of shape \(3, 2, 4, 7\) need \(3, 2, 4\): one chance for each"):
        weighted_logits(torch.randn(3, 2, 4, 7), torch.ones(shape))


# The gate, against what the reference code computed.


@lru_cache
def ouro(family: str) -> tuple[LoopedModel, Tensor, Tensor, ExitTrace]:
    """(model, logits of every loop, gate logits, trace) on the stored tokens."""
    model, stored = parity(family), expected(family)
    tokens, n_loops = stored["input_ids"], len(stored["exit_gate_logit"])
    with torch.no_grad():
        _, cache = model.run_with_cache(tokens, n_loops)
        logits = torch.stack([model.readout(state, tokens) for state in cache.stack("state_post")])
    return model, logits, cache.stack("exit_gate"), trace_exits(model, tokens, n_loops, rules=[GateRule])


@ouros
def test_exits_at_a_threshold_are_the_references(family: str) -> None:
    _, logits, gate, trace = ouro(family)
    distribution = exit_distribution(gate)
    exits = threshold_exit(distribution, 0.6)
    assert len(exits.unique()) > 2
    chosen = logits.gather(0, exits[None, ..., None].expand(1, *logits.shape[1:]))[0]
    torch.testing.assert_close(chosen, expected(family)["logits.exit_threshold0.6"], atol=1e-4, rtol=1e-4)
    assert torch.equal(trace.exit_loops(GateRule(0.6)), exits.flatten())
    torch.testing.assert_close(trace.statistics[0, :-1], distribution.cumsum(0)[:-1].flatten(1))


@ouros
def test_an_exit_at_a_step_is_the_read_out_of_that_loop(family: str) -> None:
    _, logits, gate, _ = ouro(family)
    certain = torch.zeros_like(gate)
    certain[1] = 1
    at_step = weighted_logits(logits, certain)
    torch.testing.assert_close(at_step, expected(family)["logits.exit_at_step1"], atol=1e-4, rtol=1e-4)


@ouros
def test_the_stored_weighted_exit_is_the_last_loop(family: str) -> None:
    """There the config's threshold of 1 outranks the weighted exit, so no token stops early; ours is another number."""
    model, logits, gate, trace = ouro(family)
    stored = expected(family)["logits.weighted_exit"]
    assert model.cfg.exit_threshold == 1.0
    exits = threshold_exit(exit_distribution(gate), model.cfg.exit_threshold)
    assert exits.unique().tolist() == [len(gate) - 1] == trace.exit_loops(GateRule(1.0)).unique().tolist()
    torch.testing.assert_close(logits[-1], stored, atol=1e-4, rtol=1e-4)
    assert float((weighted_logits(logits, exit_distribution(gate)) - stored).abs().max()) > 0.1


def test_edits_of_the_gate_change_where_tokens_exit() -> None:
    """Pushed at one loop of some tokens: those stop there, the others where they did, and the logits stay."""
    model, n_loops, rule = tiny("ouro", torch.float64), 5, GateRule(0.9)
    tokens = tokens_for(model)
    chosen = torch.zeros(tokens.shape, dtype=torch.bool)
    chosen[0, 1:3] = True
    plain = trace_exits(model, tokens, n_loops, rules=[GateRule])
    before = plain.exit_loops(rule).view(tokens.shape)
    with model.hooks(fwd_hooks=[("loop.1.hook_exit_gate", lambda gate, hook: torch.where(chosen, 50.0, gate))]):
        pushed = trace_exits(model, tokens, n_loops, rules=[GateRule])
    after = pushed.exit_loops(rule).view(tokens.shape)
    assert bool((before[chosen] > 1).all()) and bool((after[chosen] == 1).all())
    assert torch.equal(before[~chosen], after[~chosen]) and torch.equal(plain.kl_to_final, pushed.kl_to_final)

    def generated(change: float) -> tuple[list[int], int]:
        seen = []

        def push(gate: Tensor, hook: LoopHookPoint) -> Tensor:
            seen.append(hook.loop)
            return gate + change

        options = {"exit_rule": rule, "stop_at_eos": False, "verbose": False, "return_type": "result"}
        with model.hooks(fwd_hooks=[("hook_exit_gate", push)]):
            found = model.generate(tokens[:1, :1], 2, n_loops, **options)
        return found.loops[0].tolist(), len(seen)

    assert generated(50.0) == ([1, 1], 2)  # each loop that ran fired once
    assert generated(-50.0) == ([n_loops, n_loops], 2 * n_loops)
