"""A compiled model says what the model says, honours hooks, and a copy is not run with the original's weights."""

from __future__ import annotations

import copy

import pytest
import torch
from helpers import TINY, make, tokens_for
from torch._dynamo.utils import counters

from tl_looped import LoopedModel


@pytest.fixture(params=["huginn"])
def models(request: pytest.FixtureRequest) -> tuple[LoopedModel, LoopedModel]:
    """A model, and the same compiled; "eager" compiles nothing but traces as much as it can."""
    torch.compiler.reset()
    plain, compiled = make(**TINY[request.param]), make(**TINY[request.param])
    compiled.compile(backend="eager")
    return plain, compiled


@pytest.mark.usefixtures("as_a_user")
def test_a_compiled_model_gives_the_same(models: tuple[LoopedModel, LoopedModel]) -> None:
    plain, compiled = models
    for n_loops, tokens in ((2, tokens_for(plain)), (3, tokens_for(plain)), (2, tokens_for(plain, 1, 9))):
        torch.testing.assert_close(compiled(tokens, n_loops), plain(tokens, n_loops))
    state = compiled(tokens, 3, stop_at_loop=2)
    torch.testing.assert_close(state, plain(tokens, 3, stop_at_loop=2))
    torch.testing.assert_close(compiled(tokens, return_type="loss"), plain(tokens, return_type="loss"))
    assert counters["stats"]["unique_graphs"] >= 4
    assert dict(counters["graph_break"]) == {}


@pytest.mark.usefixtures("as_a_user")
def test_hooks_are_honoured_between_compiled_runs(models: tuple[LoopedModel, LoopedModel]) -> None:
    plain, compiled = models
    tokens = tokens_for(plain)
    before = compiled(tokens)
    hooks = [("blocks.1.loop.1.attn.hook_z", lambda z, hook: z * 0)]
    edited = compiled.run_with_hooks(tokens, fwd_hooks=hooks)
    assert torch.equal(edited, plain.run_with_hooks(tokens, fwd_hooks=hooks))
    assert not torch.allclose(edited, before)
    _, cache = compiled.run_with_cache(tokens)
    assert torch.equal(cache["resid_post", 1, 1], plain.run_with_cache(tokens)[1]["resid_post", 1, 1])
    assert torch.equal(compiled(tokens), before)


@pytest.mark.usefixtures("as_a_user")
def test_changed_weights_count_and_a_copy_has_its_own(models: tuple[LoopedModel, LoopedModel]) -> None:
    _, compiled = models
    tokens = tokens_for(compiled)
    before = compiled(tokens)
    other = copy.deepcopy(compiled)
    with torch.no_grad():
        compiled.transformer.embed.weight.mul_(2)
    assert not torch.allclose(compiled(tokens), before)
    assert torch.equal(other(tokens), before)
    loss = compiled(tokens, return_type="loss")
    loss.backward()
    assert float(compiled.transformer.embed.weight.grad.abs().max()) > 0
