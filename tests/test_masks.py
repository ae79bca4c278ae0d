"""Who sees whom: nothing quadratic is built that no kernel reads, and a query that would see nothing sees itself."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import pytest
import torch
from helpers import TINY, make, noise_like, tiny, tokens_for
from torch.utils._python_dispatch import TorchDispatchMode

from tl_looped import LoopedModel
from tl_looped.engine.runs import visibility

POS = 40


@pytest.fixture(params=TINY)
def model(request: pytest.FixtureRequest) -> LoopedModel:
    return tiny(request.param)


class Largest(TorchDispatchMode):
    """The most positions squared that any tensor of a run has."""

    def __init__(self) -> None:
        super().__init__()
        self.squares = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for one in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(one, torch.Tensor):
                self.squares += sum(size >= POS for size in one.shape) >= 2
        return out


def prompt(lengths: list[int], left: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """(tokens, attention mask) of rows of these lengths among POS positions."""
    at = torch.arange(POS)
    mask = torch.stack([at >= POS - n if left else at < n for n in lengths])
    return torch.randint(24, mask.shape, generator=torch.Generator().manual_seed(1)), mask


@torch.no_grad()
def test_a_causal_run_builds_nothing_quadratic():
    """Neither does padding behind the text, nor generation without padding."""
    model = make(**{**TINY["huginn"], "n_ctx": 2 * POS, "d_model": 16, "d_mlp": 12, "d_vocab": 24})
    for lengths, options in (([POS, POS], {}), ([POS, 7], {}), ([POS, 7], {"mask": True})):
        tokens, mask = prompt(lengths, left=False)
        given = {"attention_mask": mask} if options else {}
        with Largest() as largest:
            run = model.batch(tokens, **given)
            model.execute(run)
        assert run.visible is None
        assert largest.squares == 0
    with Largest() as largest:
        model.generate(tokens, max_new_tokens=3, stop_at_eos=False, return_type="tokens")
    assert largest.squares == 0
    tokens, mask = prompt([POS, 7], left=True)
    assert model.batch(tokens, attention_mask=mask).visible.shape == (2, POS, POS)


@torch.no_grad()
def test_padding_behind_changes_nothing_before_it(model: LoopedModel):
    tokens, mask = prompt([POS, 9], left=False)
    tokens, mask = tokens[:, :30], mask[:, :30]  # the model's context is 32
    logits = model(tokens, attention_mask=mask)
    torch.testing.assert_close(logits[1, :9], model(tokens[1:, :9])[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(logits[:1], model(tokens[:1]), rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_padding_that_sees_nothing_sees_itself_alone(model: LoopedModel):
    """Not every key, nor a future one: in patterns, and in what the fused attention computes."""
    tokens = tokens_for(model, batch=2, pos=6)
    mask = torch.tensor([[0, 0, 0, 1, 1, 1], [1, 1, 1, 1, 1, 1]])
    _, cache = model.run_with_cache(tokens, attention_mask=mask)
    for layer in (0, 1):
        pattern, v, z = cache["pattern", layer, 1], cache["v", layer, 1], cache["z", layer, 1]
        assert torch.equal(pattern[0, :, :3, :], torch.eye(6)[:3].expand_as(pattern[0, :, :3]))
        v = v.repeat_interleave(z.shape[2] // v.shape[2], dim=2)
        torch.testing.assert_close(z[0, :3], v[0, :3])
    blind = torch.zeros(2, 6, 6, dtype=torch.bool)
    blind[:, 3:] = True
    _, cache = model.run_with_cache(tokens, attention_mask=blind)
    assert torch.equal(cache["pattern", 0, 0][:, :, :3], torch.eye(6)[:3].expand(2, 4, 3, 6))


def test_the_callers_mask_stays_as_it_is():
    tokens = torch.zeros(1, 4, dtype=torch.long)
    given = torch.zeros(1, 4, 4, dtype=torch.bool)
    _, visible = visibility(tokens, given, None)
    assert not given.any()
    assert visible is not None
    assert torch.equal(visible[0], torch.eye(4).bool())


@pytest.mark.parametrize("lengths", [[6, 6], [6, 3], [3, 6]])
@pytest.mark.parametrize("left", [False, True])
def test_visibility_against_the_definition(lengths: list[int], left: bool):
    """For real queries: every real key up to themselves."""
    tokens, mask = prompt([n + POS - 6 for n in lengths], left)
    real, visible = visibility(tokens, None, mask)
    assert torch.equal(real, mask)
    seen = torch.ones(POS, POS).tril().bool().expand(2, -1, -1) if visible is None else visible
    for row in range(2):
        for query in mask[row].nonzero().flatten().tolist():
            keys = [key for key in range(query + 1) if mask[row, key]]
            assert seen[row, query].nonzero().flatten().tolist() == keys


@torch.no_grad()
def test_patterns_are_causal_where_no_mask_is_built(model: LoopedModel):
    """Whole prompts, and one position at a time with a cache of keys."""
    tokens, n_loops = tokens_for(model, pos=5), 2
    state = None if not model.cfg.draws_state else noise_like(model(tokens, stop_at_loop=0))
    given = {} if state is None else {"initial_state": state}
    _, cache = model.run_with_cache(tokens, n_loops, **given)
    for name, pattern in cache.items():
        if name.endswith("hook_pattern"):
            assert float(pattern.triu(1).abs().max()) == 0
            torch.testing.assert_close(pattern.sum(-1), torch.ones_like(pattern.sum(-1)))
        if name.endswith("attn_scores"):
            assert bool((pattern.isneginf() == torch.ones(5, 5).triu(1).bool()).all())


def test_a_run_has_no_quadratic_field_of_its_own(model: LoopedModel):
    run = model.batch(tokens_for(model, pos=5))
    for field in fields(run):
        value = getattr(run, field.name)
        assert not isinstance(value, torch.Tensor) or list(value.shape).count(5) < 2
