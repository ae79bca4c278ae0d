"""Hooks while text is generated: where and how often they act, what they see, and that nothing of them stays."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import TINY, hook_count, make, tiny, tokens_for

from tl_looped import HookNameError, InputError, LoopedModel
from tl_looped.generation import Generated

N_PROMPT, N_NEW, N_LOOPS = 4, 3, 3


@pytest.fixture(params=TINY)
def model(request: pytest.FixtureRequest) -> LoopedModel:
    return tiny(request.param, torch.float64)


def generated(model: LoopedModel, tokens: torch.Tensor, hooks: Any = (), **options: Any) -> Generated:
    options = {"do_sample": False, "stop_at_eos": False, "verbose": False, **options}
    with model.hooks(fwd_hooks=hooks):
        found = model.generate(tokens, N_NEW, N_LOOPS, return_type="result", **options)
    assert hook_count(model) == 0
    assert model.hook_dict.progress.first_position == 0
    return found


def test_hooks_act_at_every_loop_of_every_step(model):
    """The first step has the prompt's positions, a later one its newest."""
    tokens, seen = tokens_for(model, pos=N_PROMPT), []
    hooks = [(lambda _: True, lambda x, hook: seen.append((hook.name, hook.first_position, x.shape)))]
    generated(model, tokens, hooks)
    once = []
    model.run_with_hooks(tokens, N_LOOPS, fwd_hooks=[(lambda _: True, lambda x, hook: once.append(hook.name))])
    begins = [0, N_PROMPT, N_PROMPT + 1]
    assert [(name, begin) for name, begin, _ in seen] == [(name, begin) for begin in begins for name in once]
    for name, begin, shape in seen:
        axes = model.hook_dict[name].site.axes
        assert shape[axes.index("batch")] == 2
        assert shape[model.hook_dict[name].site.pos_axis] == (N_PROMPT if begin == 0 else 1)
        if "key" in axes:
            assert shape[axes.index("key")] == max(N_PROMPT, begin + 1)


def test_without_the_cache_hooks_see_all_positions(model):
    tokens, seen = tokens_for(model, pos=N_PROMPT), []
    hooks = [("hook_state_post", lambda x, hook: seen.append((hook.loop, hook.first_position, x.shape[1])))]
    generated(model, tokens, hooks, use_past_kv_cache=False)
    assert seen == [(t, 0, N_PROMPT + i) for i in range(N_NEW) for t in range(N_LOOPS)]


def test_activations_are_those_of_a_whole_forward(model):
    """Every site, patterns and scores among them: the rows of the whole that belong to the new positions."""
    tokens, seen = tokens_for(model, pos=N_PROMPT), []
    mask = torch.ones_like(tokens)
    mask[1, :2] = 0
    hooks = [(lambda _: True, lambda x, hook: seen.append((hook.name, hook.first_position, x)))]
    found = generated(model, tokens, hooks, attention_mask=mask)
    mask = torch.cat((mask, torch.ones_like(mask[:, : N_NEW - 1])), dim=1)
    options = {"names_filter": lambda _: True, "attention_mask": mask}
    with torch.no_grad():
        _, cache = model.run_with_cache(found.tokens[:, :-1], N_LOOPS, **options)
    for name, begin, x in seen:
        site = model.hook_dict[name].site
        size = x.shape[site.pos_axis]
        whole = cache[name].narrow(site.pos_axis, begin, size)
        if "key" in site.axes:
            later = whole[..., x.shape[-1] :]
            assert bool((later == (0 if "pattern" in name else -torch.inf)).all())
            whole = whole[..., : x.shape[-1]]
        torch.testing.assert_close(x, whole, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("cache", [True, False])
def test_watching_changes_nothing(model, cache):
    tokens = tokens_for(model, pos=N_PROMPT)
    plain = generated(model, tokens, use_past_kv_cache=cache)
    watched = generated(model, tokens, [(lambda _: True, lambda x, hook: None)], use_past_kv_cache=cache)
    assert torch.equal(plain.tokens, watched.tokens)
    assert torch.equal(plain.log_probs, watched.log_probs)


def moved(x: torch.Tensor, hook: Any) -> torch.Tensor:
    """Every position moves, each in its own direction."""
    axis = hook.site.pos_axis
    where = (hook.first_position + torch.arange(x.shape[axis])).view([-1 if i == axis else 1 for i in range(x.ndim)])
    return x + 0.5 * torch.sin(1.0 + where + torch.arange(x.shape[-1]))


def no_first_key(x: torch.Tensor, hook: Any) -> torch.Tensor:
    """Nobody but position 0 attends to it."""
    x = x.clone()
    rows = slice(1, None) if hook.first_position == 0 else slice(None)
    x[:, :, rows, 0] = 0 if "pattern" in hook.name else -torch.inf
    return x / x.sum(-1, keepdim=True) if "pattern" in hook.name else x


EDITS = [("loop.1.hook_state_post", moved), ("blocks.1.loop.2.attn.hook_v", moved), ("blocks.0.attn.hook_rot_k", moved)]
EDITS += [("blocks.0.loop.0.attn.hook_k", moved), ("blocks.1.attn.hook_pattern", no_first_key)]
EDITS += [("blocks.0.loop.1.attn.hook_attn_scores", no_first_key), ("blocks.1.loop.1.ln{}.hook_scale", moved)]
EDITS += [("hook_embed", moved), ("hook_state_init", moved), ("blocks.0.loop.1.attn.hook_result", moved)]


@pytest.mark.parametrize(("name", "edit"), EDITS)
@pytest.mark.parametrize("family", ["huginn", "ouro", "olmo2"])
def test_an_edit_does_the_same_with_and_without_the_cache(family, name, edit):
    model = tiny(family, torch.float64)
    name = name.format("1_post" if model.cfg.norm_placement == "output" else "1")
    tokens = tokens_for(model, pos=N_PROMPT)
    found = generated(model, tokens, [(name, edit)])
    wanted = generated(model, tokens, [(name, edit)], use_past_kv_cache=False)
    assert torch.equal(found.tokens, wanted.tokens)
    torch.testing.assert_close(found.log_probs, wanted.log_probs, rtol=1e-10, atol=1e-10)
    assert not torch.allclose(found.log_probs[:, 0], model(tokens, N_LOOPS)[:, -1].log_softmax(-1).amax(-1))


def test_an_edit_of_the_new_positions_alone(model):
    tokens = tokens_for(model, pos=N_PROMPT)

    def edit(x: torch.Tensor, hook: Any) -> torch.Tensor:
        new = hook.first_position + torch.arange(x.shape[1]) >= N_PROMPT
        return torch.where(new[:, None], moved(x, hook), x)

    hooks = [("blocks.0.loop.1.hook_resid_mid", edit)]
    found, wanted = (generated(model, tokens, hooks, use_past_kv_cache=cache) for cache in (True, False))
    plain = generated(model, tokens)
    torch.testing.assert_close(found.log_probs, wanted.log_probs, rtol=1e-10, atol=1e-10)
    assert torch.equal(found.log_probs[:, 0], plain.log_probs[:, 0])
    assert not torch.allclose(found.log_probs[:, 1], plain.log_probs[:, 1])


# What stays, and what does not.


@pytest.mark.parametrize("cache", [True, False])
@pytest.mark.parametrize("stop_at", ["blocks.1.loop.1.hook_resid_mid", "ln_final.hook_scale"])
def test_an_error_in_a_hook_leaves_nothing_behind(stop_at, cache):
    """And the step that it broke may be asked for again, after it as well as before."""
    model = tiny("llama", torch.float64)
    tokens = tokens_for(model, pos=N_PROMPT)
    before = model(tokens)
    stream = model.generate_stream(tokens, 4, N_LOOPS, stop_at_eos=False, use_past_kv_cache=cache)
    wanted = list(model.generate_stream(tokens, 4, N_LOOPS, stop_at_eos=False, use_past_kv_cache=cache))
    found = []
    while len(found) < 4:
        with pytest.raises(ZeroDivisionError), model.hooks(fwd_hooks=[(stop_at, lambda x, hook: 1 / 0)]):
            next(stream)
        assert hook_count(model) == 0
        assert model.hook_dict.progress.first_position == 0
        assert torch.is_grad_enabled()
        found.append(next(stream))
    assert [step.tokens.tolist() for step in found] == [step.tokens.tolist() for step in wanted]
    assert all(torch.equal(a.log_probs, b.log_probs) for a, b in zip(found, wanted, strict=True))
    assert torch.equal(model(tokens), before)


def test_between_steps_the_model_is_free():
    """Runs in between, with gradients and with hooks that ask where they are, and another stream."""
    model = tiny("huginn", torch.float64)
    tokens, other = tokens_for(model), tokens_for(model, seed=9)
    options: dict[str, Any] = {"stop_at_eos": False, "verbose": False}
    wanted = model.generate(tokens, 4, **options), model.generate(other, 4, **options)
    streams = [model.generate_stream(one, 4, stop_at_eos=False) for one in (tokens, other)]
    seen: list[int] = []
    new = []
    for steps in zip(*streams, strict=True):
        assert torch.is_grad_enabled()
        new.append(torch.stack([step.tokens for step in steps]))
        hooks = [("hook_state_post", lambda x, hook: seen.append(hook.first_position))]
        loss = model.run_with_hooks(tokens, return_type="loss", fwd_hooks=hooks)
        assert loss.requires_grad
    assert set(seen) == {0}
    for i in range(2):
        assert torch.equal(torch.stack([step[i] for step in new], dim=1), wanted[i][:, -4:])


def test_gradients_are_off_and_come_back():
    model = tiny("ouro")
    seen = []
    with model.hooks(fwd_hooks=[("hook_embed", lambda x, hook: seen.append(torch.is_grad_enabled()))]):
        found = model.generate(tokens_for(model), 2, stop_at_eos=False, return_type="result", verbose=False)
    assert seen == [False, False]
    assert not found.log_probs.requires_grad
    assert torch.is_grad_enabled()


@pytest.mark.parametrize("cache", [True, False])
def test_hooks_that_could_not_act_are_refused(cache):
    model = tiny("ouro")
    tokens, options = tokens_for(model), {"stop_at_eos": False, "use_past_kv_cache": cache}
    ran = []
    watching = ("hook_embed", lambda x, hook: ran.append(hook.name))
    beyond = ("loop.2.hook_state_post", lambda x, hook: None)
    message = r"'loop.2.hook_state_post', which this run does not reach: loops 0 to 1"
    with model.hooks(fwd_hooks=[watching, beyond]), pytest.raises(HookNameError, match=message):
        model.generate_stream(tokens, 4, **options)
    stream = model.generate_stream(tokens, 4, **options)
    next(stream)
    with model.hooks(fwd_hooks=[watching, beyond]), pytest.raises(HookNameError, match=message):
        next(stream)
    backward = [("hook_state_post", lambda x, hook: None)]
    message = "a backward hook is registered, but text is generated without gradients"
    with model.hooks(fwd_hooks=[watching], bwd_hooks=backward), pytest.raises(InputError, match=message):
        model.generate_stream(tokens, 4, **options)
    assert ran == []


def test_numbers_that_are_none_are_refused():
    model = tiny("ouro")
    hooks = [("loop.1.hook_state_post", lambda x, hook: x * float("nan"))]
    with model.hooks(fwd_hooks=hooks), pytest.raises(InputError, match=r"not finite, from 'loop.1.hook_state_post'"):
        model.generate(tokens_for(model), 2, stop_at_eos=False, verbose=False)


def test_in_an_ordinary_run_tensors_begin_at_position_zero():
    model = make(n_core=1)
    seen = []
    hooks = [("hook_state_post", lambda x, hook: seen.append(hook.first_position))]
    model.run_with_hooks(tokens_for(model), fwd_hooks=hooks)
    assert seen == [0, 0]
    assert model.hook_dict["loop.1.hook_state_post"].first_position == 0
