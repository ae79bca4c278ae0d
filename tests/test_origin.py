"""Analyses say where activations stopped being finite, and refuse models without loops."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import hook_count, tiny, tokens_for
from torch import Tensor

from tl_looped import InputError
from tl_looped.attention import attention_bound, attention_stability
from tl_looped.dynamics import jacobian_spectrum, path_independence, similarity, trajectory
from tl_looped.lens import logit_lens, readout_agreement, trace_exits
from tl_looped.observe.watching import first_not_finite
from tl_looped.stages import neuron_shares

LOOPS = 3
PLACE = "blocks.1.loop.1.hook_mlp_out"


def poison(x: Tensor, hook: object) -> Tensor:
    return torch.full_like(x, float("nan"))


@pytest.mark.parametrize("analysis", [attention_stability, attention_bound, jacobian_spectrum])
@pytest.mark.parametrize("family", ["ouro", "llama"])
def test_the_error_names_where_it_began(family: str, analysis: Callable[..., Any]) -> None:
    model = tiny(family)
    tokens = tokens_for(model, batch=1)
    message = f"activations are not finite, from '{PLACE}' .layer 1, loop 1. on. Look at the weights"
    with model.hooks(fwd_hooks=[(PLACE, poison)]), pytest.raises(InputError, match=message):
        analysis(model, tokens, LOOPS)
    assert hook_count(model) == 0


def test_other_errors_stay_as_they_are() -> None:
    with pytest.raises(InputError, match="compares loops, but this run has one: pass n_loops of at least 2"):
        attention_stability(tiny("ouro"), tokens_for(tiny("ouro"), batch=1), 1)


def test_a_finite_run_has_no_origin() -> None:
    model = tiny("huginn")
    run = model.batch(tokens_for(model), LOOPS)
    assert first_not_finite(model, run) is None
    with model.hooks(fwd_hooks=[("loop.2.hook_state_post", poison)]):
        assert first_not_finite(model, run) == ("loop.2.hook_state_post", 0)


def test_a_lens_refuses_what_is_not_a_number() -> None:
    model = tiny("llama")
    message = "the read-out of 'loop.1.hook_state_post' is not a number"
    with model.hooks(fwd_hooks=[(PLACE, poison)]), pytest.raises(InputError, match=message):
        logit_lens(model, tokens_for(model), LOOPS)


@pytest.mark.parametrize(
    "analysis",
    [
        attention_stability,
        attention_bound,
        jacobian_spectrum,
        similarity,
        trajectory,
        path_independence,
        logit_lens,
        readout_agreement,
        trace_exits,
        lambda model, tokens: neuron_shares(model),
    ],
)
def test_a_model_without_loops_is_refused(as_a_user: None, analysis: Callable[..., Any]) -> None:
    view = tiny("llama").unrolled(2)
    with pytest.raises(InputError, match="needs a LoopedModel, got UnrolledModel: for a feedforward model"):
        analysis(view, tokens_for(tiny("llama"), batch=1))


def test_a_seed_that_torch_can_not_take() -> None:
    model = tiny("huginn")
    with pytest.raises(InputError, match=r"at least 0 and below 2\*\*63, got 18446744073709551616"):
        model(tokens_for(model), seed=2**64)
