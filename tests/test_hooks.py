"""Forward hooks, indexed by loop: what they see and may change, when they act, and that nothing is left behind."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
import torch
from helpers import (
    FAMILIES,
    TINY,
    expected,
    fired,
    hook_count,
    make,
    noise_like,
    parity,
    run_options,
    tiny,
    tokens_for,
    waits,
)
from plain import Plain, weights_of

from tl_looped import HookNameError, HookSite, InputError, LoopedModel, LoopHookPoint
from tl_looped.engine.schedule import BLOCK_AXES

EVERY = [(lambda _: True, lambda x, hook: None)]
# For what no family can make different.
once = pytest.mark.parametrize("model", ["huginn"], indirect=True)


@pytest.fixture(params=TINY)
def model(request: pytest.FixtureRequest) -> Iterator[LoopedModel]:
    """A shared model, which a test has to leave without hooks."""
    model = tiny(request.param)
    yield model
    assert hook_count(model) == 0
    assert model.context_level == 0


@pytest.fixture
def tokens(model: LoopedModel) -> torch.Tensor:
    return tokens_for(model, batch=1, pos=4)


# A hook that returns nothing.


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("name", FAMILIES)
def test_watching_changes_nothing_to_the_bit(name: str, grad: bool):
    model, tokens, options = parity(name), expected(name)["input_ids"], run_options(name, parity(name))
    with torch.set_grad_enabled(grad):
        plain = model(tokens, n_loops=3, **options)
        watched = model.run_with_hooks(tokens, n_loops=3, fwd_hooks=EVERY, **options)
    assert torch.equal(plain, watched)
    assert watched.requires_grad == grad


@pytest.mark.parametrize("component", ["attn.hook_attn_scores", "attn.hook_pattern", "attn.hook_result"])
def test_watching_what_is_not_computed_otherwise_changes_nothing(model, tokens, component):
    seen = []
    hooks = [(lambda name: name.endswith(component), lambda x, hook: seen.append(hook.name))]
    assert torch.equal(model(tokens), model.run_with_hooks(tokens, fwd_hooks=hooks))
    assert seen


def test_watching_keeps_the_gradients(model, tokens):
    def gradients(hooks) -> dict[str, torch.Tensor]:
        model.zero_grad()
        model.run_with_hooks(tokens, return_type="loss", fwd_hooks=hooks).backward()
        found = {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.grad is not None}
        model.zero_grad()
        return found

    torch.testing.assert_close(gradients(EVERY), gradients([]), rtol=1e-4, atol=1e-5)


# Which names fire, and when.


def names_of(model: LoopedModel, n_loops: int) -> list[str]:
    """Every name of a whole run, from the schedule and the sites that the model lists."""
    names = []
    for point in model.hook_dict.points():
        names += [point.site.at(t).name for t in range(n_loops)] if point.looped else [point.name]
    return names


def test_every_site_fires_once_in_every_loop(model, tokens):
    seen = fired(model, tokens, n_loops=3)
    assert len(seen) == len(set(seen))
    assert sorted(seen) == sorted(names_of(model, 3))


def test_layers_fire_in_the_order_of_the_schedule(model, tokens):
    for n_loops in (1, 3):
        schedule = model.cfg.schedule(n_loops)
        seen = [HookSite.parse(name) for name in fired(model, tokens, n_loops=n_loops)]
        for component in ("hook_resid_pre", "attn.hook_pattern", "hook_resid_post"):
            calls = [(site.stack, site.layer, site.loop) for site in seen if site.component == component]
            assert calls == list(schedule.layer_calls())
            assert [schedule.realised_depth(*call) for call in calls] == list(range(schedule.depth))


def test_the_sites_of_a_layer_fire_in_the_order_of_the_table(model, tokens):
    order = list(BLOCK_AXES)
    if model.cfg.norm_placement == "residual_sandwich":  # it normalises what is there after the sum
        for name, out in (("ln1_post", "hook_attn_out"), ("ln2_post", "hook_mlp_out")):
            order.remove(out)
            order.insert(order.index(f"{name}.hook_scale"), out)
    sites = [HookSite.parse(name) for name in fired(model, tokens, n_loops=2)]
    at = [order.index(s.component) for s in sites if (s.stack, s.layer, s.loop) == ("blocks", 1, 1)]
    assert at == sorted(at)
    assert len(at) > 15


def test_an_unindexed_name_fires_at_every_loop_in_order(model, tokens):
    seen = []
    hooks = [("blocks.1.hook_resid_post", lambda x, hook: seen.append(hook.name))]
    model.run_with_hooks(tokens, n_loops=5, fwd_hooks=hooks)
    assert seen == [f"blocks.1.loop.{t}.hook_resid_post" for t in range(5)]


def test_an_indexed_name_fires_at_its_loop_alone(model, tokens):
    seen = []
    hooks = [(f"blocks.0.loop.{t}.attn.hook_z", lambda x, hook: seen.append((hook.name, hook.loop))) for t in (3, 1)]
    model.run_with_hooks(tokens, n_loops=5, fwd_hooks=hooks)
    assert seen == [(f"blocks.0.loop.{t}.attn.hook_z", t) for t in (1, 3)]


@once
def test_a_function_chooses_by_the_name_with_the_loop(model, tokens):
    seen = []
    hooks = [(lambda name: name.startswith("blocks.1.loop.2.ln"), lambda x, hook: seen.append(hook.name))]
    model.run_with_hooks(tokens, n_loops=4, fwd_hooks=hooks)
    assert seen
    assert all(name.startswith("blocks.1.loop.2.ln") for name in seen)


def test_what_a_hook_is_told(model, tokens):
    told: dict[str, LoopHookPoint] = {}
    hooks = [(lambda _: True, lambda x, hook: told.update({hook.name: hook}))]
    model.run_with_hooks(tokens, n_loops=2, fwd_hooks=hooks)
    hook = told["blocks.1.loop.1.attn.hook_q"]
    assert (hook.name, hook.loop, hook.layer()) == ("blocks.1.loop.1.attn.hook_q", 1, 1)
    assert hook.site == HookSite("attn.hook_q", "blocks", 1, 1)
    assert repr(hook) == "LoopHookPoint('blocks.1.loop.1.attn.hook_q')"
    assert (told["loop.1.hook_state_post"].loop, told["hook_embed"].loop) == (1, None)
    if model.cfg.n_coda:
        assert (told["coda.0.hook_resid_post"].layer(), told["coda.0.hook_resid_post"].loop) == (0, None)
    with pytest.raises(HookNameError, match=r"'loop.1.hook_state_post' belongs to no layer"):
        told["loop.1.hook_state_post"].layer()


def test_the_shapes_are_those_of_the_axes(model, tokens):
    """One table says what every activation looks like."""
    cfg, shapes = model.cfg, {}
    hooks = [(lambda _: True, lambda x, hook: shapes.update({hook.name: (x.shape, hook.site.axes)}))]
    model.run_with_hooks(tokens, n_loops=1, fwd_hooks=hooks)
    sizes = {"batch": 1, "pos": 4, "query": 4, "key": 4, "one": 1, "head": cfg.n_heads, "kv_head": cfg.kv_heads}
    sizes |= {"d_head": cfg.d_head, "d_model": cfg.d_model, "d_mlp": cfg.d_mlp}
    for name, (shape, axes) in shapes.items():
        assert tuple(shape) == tuple(sizes[axis] for axis in axes), name


@once
def test_a_hook_can_register_itself_for_its_own_loop(model, tokens):
    point = model.hook_dict["blocks.0.loop.2.hook_resid_post"]
    seen = []
    point.add_hook(lambda x, hook: seen.append(hook.name))
    model(tokens, n_loops=4)
    model.reset_hooks()
    assert seen == ["blocks.0.loop.2.hook_resid_post"]


@once
def test_every_loop_has_a_scratch_dictionary_of_its_own(model, tokens):
    def count(x, hook):
        hook.ctx["loops"] = [*hook.ctx.get("loops", []), hook.loop]

    hooks = [("blocks.0.hook_resid_pre", count), ("hook_embed", count)]
    for _ in range(2):
        model.run_with_hooks(tokens, n_loops=3, fwd_hooks=hooks)
    names = ["hook_embed", *(f"blocks.0.loop.{t}.hook_resid_pre" for t in range(3))]
    found = [model.hook_dict[name].ctx for name in names]
    assert found == [{"loops": [None, None]}, *({"loops": [t, t]} for t in range(3))]
    model.clear_contexts()
    assert [model.hook_dict[name].ctx for name in names] == [{}] * 4


# Editing.


def test_editing_any_site_changes_the_output(model, tokens):
    """But for the exit gate, which the model computes and does not use."""
    with torch.no_grad():
        clean = model(tokens, n_loops=2)
        for name in names_of(model, 2):
            if ".loop.0." in name:
                continue
            edit = (name, lambda x, hook: x + 0.5 * noise_like(x))
            edited = model.run_with_hooks(tokens, n_loops=2, fwd_hooks=[edit])
            assert torch.equal(clean, edited) == name.endswith("hook_exit_gate"), name


def returned(x, hook):
    return x + 0.5 * noise_like(x)


def in_place(x, hook):
    x += 0.5 * noise_like(x)


# Where the tensor that passes is also someone else's: the caller's state, the prelude's output, or another site's.
SHARED = ["hook_embed", "hook_state_init", "loop.0.hook_state_pre", "loop.0.hook_injection", "loop.0.hook_state_post"]
SHARED += ["blocks.0.loop.0.hook_resid_pre", "blocks.1.loop.1.hook_resid_post", "blocks.0.loop.1.hook_resid_mid"]


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_an_edit_in_place_is_the_same_edit(model, tokens, mode):
    """At this site, and nothing but this site changes: not the state given, not the prelude's output in later loops."""
    with mode():
        state = noise_like(model(tokens, stop_at_loop=0))
        kept = state.clone()
        mixed_in = [] if model.cfg.injection == "none" else ["loop.1.hook_injection_in"]
        for name in [*SHARED, *mixed_in] if mode is torch.no_grad else [lambda _: True]:
            for options in ({}, {"initial_state": state}):
                if options and name == "hook_embed" and model.cfg.injection == "none":
                    continue  # the tokens are not read
                one, two = (
                    model.run_with_hooks(tokens, n_loops=2, fwd_hooks=[(name, hook)], **options)
                    for hook in (returned, in_place)
                )
                assert torch.equal(one, two), name
        assert torch.equal(state, kept)


@pytest.mark.parametrize(
    "name", ["hook_state_init", "blocks.1.loop.1.hook_resid_mid", "blocks.0.loop.1.attn.hook_rot_q"]
)
def test_an_edit_in_place_with_gradients(model, tokens, name):
    found = []
    for hook in (returned, in_place):
        loss = model.run_with_hooks(tokens, n_loops=2, return_type="loss", fwd_hooks=[(name, hook)])
        found.append(torch.autograd.grad(loss, model.transformer.blocks[0].attn.q.weight)[0])
    assert torch.equal(*found)


@pytest.mark.parametrize(
    "name", ["blocks.1.loop.1.attn.hook_pattern", "blocks.1.loop.1.attn.hook_z", "loop.1.hook_state_pre"]
)
def test_an_edit_reaches_nothing_that_ran_before_it(model, tokens, name):
    options = {"n_loops": 3, "names_filter": lambda _: True}
    _, clean = model.run_with_cache(tokens, **options)
    with model.hooks([(name, lambda x, hook: x * 0.5)]):
        _, edited = model.run_with_cache(tokens, **options)
    names = list(clean)
    at = names.index(name)
    assert all(torch.equal(clean[one], edited[one]) for one in names[:at])
    assert torch.equal(edited[name], clean[name] * 0.5)
    after = [one for one in names if HookSite.parse(one).loop == 2 and one.endswith("hook_resid_post")]
    assert not any(torch.equal(clean[one], edited[one]) for one in after)


@once
def test_editing_every_loop_is_editing_each(model, tokens):
    def double(x, hook):
        return x * 2

    every = model.run_with_hooks(tokens, n_loops=3, fwd_hooks=[("blocks.0.attn.hook_z", double)])
    each = [(f"blocks.0.loop.{t}.attn.hook_z", double) for t in range(3)]
    assert torch.equal(every, model.run_with_hooks(tokens, n_loops=3, fwd_hooks=each))


@pytest.mark.parametrize("family", TINY)
def test_uniform_attention_at_one_loop_is_the_plain_computation(family):
    model = tiny(family, torch.float64)
    tokens = tokens_for(model)
    name = "blocks.1.loop.1.attn.hook_pattern"

    def uniform(pattern: torch.Tensor) -> torch.Tensor:
        rows = torch.ones_like(pattern).tril()
        return rows / rows.sum(-1, keepdim=True)

    hooks = [(name, lambda x, hook: uniform(x))]
    found = model.run_with_hooks(tokens, n_loops=3, fwd_hooks=hooks)
    plain = Plain(model.cfg, weights_of(model), lambda at, x: uniform(x) if at == name else x)
    wanted = plain.run(tokens, 3, model.batch(tokens).state)
    torch.testing.assert_close(found, wanted, rtol=1e-11, atol=1e-11)
    assert not torch.allclose(found, model(tokens, n_loops=3), atol=1e-2)


def test_scores_masked_by_a_hook_give_no_attention(model, tokens):
    patterns = {}

    def hide_first(scores, hook):
        scores[..., 1:, 0] = -torch.inf

    hooks = [
        ("blocks.0.loop.1.attn.hook_attn_scores", hide_first),
        ("blocks.0.attn.hook_pattern", lambda x, hook: patterns.update({hook.loop: x.detach()})),
    ]
    model.run_with_hooks(tokens, n_loops=3, fwd_hooks=hooks)
    assert float(patterns[1][..., 1:, 0].abs().max()) == 0
    torch.testing.assert_close(patterns[1].sum(-1), torch.ones_like(patterns[1].sum(-1)))
    assert all(float(patterns[t][..., 1:, 0].min()) > 0 for t in (0, 2))


@once
def test_hooks_of_one_site_see_each_others_edits_in_order(model, tokens):
    seen = []

    def add(number, x, hook):
        seen.append((number, x.flatten()[0].item()))
        return torch.full_like(x, number)

    hooks = [("loop.0.hook_state_pre", partial(add, 1.0)), ("loop.0.hook_state_pre", partial(add, 2.0))]
    model.run_with_hooks(tokens, n_loops=1, fwd_hooks=hooks)
    assert seen[1] == (2.0, 1.0)
    with model.hooks(hooks):
        model.add_hook("loop.0.hook_state_pre", partial(add, 3.0), level=model.context_level, prepend=True)
        seen.clear()
        model(tokens, n_loops=1)
    assert [number for number, _ in seen] == [3.0, 1.0, 2.0]
    assert seen[1] == (1.0, 3.0)


@once
@pytest.mark.parametrize(
    ("returned", "message"),
    [
        (lambda x: x[:, :1], r"returned shape \(1, 1, \d+\) torch.float32, but the activation has shape \(1, 4, \d+\)"),
        (
            lambda x: x.double(),
            r"returned shape .* torch.float64, but the activation has shape .* torch.float32: return",
        ),
        (lambda x: 0.0, r"returned float; return a tensor, or None for no change"),
        (lambda x: (x,), r"returned tuple; return a tensor"),
    ],
)
def test_what_a_hook_may_not_return(model, tokens, returned, message):
    name = "blocks.0.loop.1.hook_resid_post"
    with pytest.raises(InputError, match=r"the hook on 'blocks.0.loop.1.hook_resid_post' " + message):
        model.run_with_hooks(tokens, fwd_hooks=[(name, lambda x, hook: returned(x))])


# Coming and going.


@once
def test_hooks_are_gone_after_the_run_also_when_one_raises(model, tokens):
    clean = model(tokens)

    def fail(x, hook):
        raise ZeroDivisionError(hook.name)

    model.run_with_hooks(tokens, fwd_hooks=EVERY)
    assert hook_count(model) == 0
    with pytest.raises(ZeroDivisionError, match=r"blocks.1.loop.1.hook_resid_mid"):
        model.run_with_hooks(tokens, fwd_hooks=[*EVERY, ("blocks.1.loop.1.hook_resid_mid", fail)], bwd_hooks=EVERY)
    with pytest.raises(HookNameError, match=r"no hook point 'blocks.9.hook_z'"):
        model.run_with_hooks(tokens, fwd_hooks=[*EVERY, ("blocks.9.hook_z", fail)])
    with pytest.raises(ZeroDivisionError, match="hook_state_init"), model.hooks([("hook_state_init", fail)]):
        model.run_with_cache(tokens)
    assert hook_count(model) == 0
    assert model.context_level == 0
    assert torch.equal(model(tokens), clean)


@once
def test_levels_of_contexts_end_one_by_one(model, tokens):
    seen = []

    def note(text, x, hook):
        seen.append(text)

    site = "loop.0.hook_state_pre"
    with model.hooks([(site, partial(note, "outer"))]):
        with model.hooks([(site, partial(note, "inner"))]):
            assert model.context_level == 2
            model.run_with_hooks(tokens, n_loops=1, fwd_hooks=[(site, partial(note, "run"))])
            assert seen == ["outer", "inner", "run"]
        seen.clear()
        model(tokens, n_loops=1)
        assert seen == ["outer"]
    seen.clear()
    model(tokens, n_loops=1)
    assert seen == []


@once
def test_permanent_hooks_stay_until_told_otherwise(model, tokens):
    seen = []
    model.add_perma_hook("loop.1.hook_state_pre", lambda x, hook: seen.append(hook.loop))
    model.run_with_hooks(tokens, n_loops=2, fwd_hooks=EVERY)
    model.reset_hooks()
    model(tokens, n_loops=2)
    assert seen == [1, 1]
    assert model.list_hooks(including_permanent=False) == {}
    assert list(model.list_hooks()) == ["hook_state_pre"]
    model.reset_hooks(including_permanent=True)
    model(tokens, n_loops=2)
    assert seen == [1, 1]


@once
def test_reset_end_off_keeps_hooks(model, tokens):
    seen = []
    hooks = [("blocks.0.loop.1.hook_resid_pre", lambda x, hook: seen.append(hook.loop))]
    model.run_with_hooks(tokens, fwd_hooks=hooks, reset_hooks_end=False)
    model(tokens)
    model.reset_hooks()
    model(tokens)
    assert seen == [1, 1]


@once
def test_hooks_are_listed_by_physical_name(model, tokens):
    with model.hooks([("blocks.0.loop.1.hook_resid_pre", EVERY[0][1])], [("blocks.1.hook_resid_post", EVERY[0][1])]):
        assert list(model.list_hooks()) == ["blocks.0.hook_resid_pre", "blocks.1.hook_resid_post"]
        assert list(model.list_hooks(dir="bwd")) == ["blocks.1.hook_resid_post"]
        assert list(model.list_hooks("blocks.0.hook_resid_pre")) == ["blocks.0.hook_resid_pre"]
        (handle,) = model.list_hooks()["blocks.0.hook_resid_pre"]
        assert (handle.context_level, handle.is_permanent, handle.user_hook) == (1, False, EVERY[0][1])


@once
def test_many_loops_make_no_objects(model, tokens):
    """128 loops have the hook points of one."""
    before = len(model.hook_dict)
    model.run_with_hooks(tokens, n_loops=128, fwd_hooks=[("blocks.0.loop.127.hook_resid_post", EVERY[0][1])])
    assert len(model.hook_dict) == before
    assert len(model.hook_dict["blocks.0.hook_resid_post"].fwd_hooks) == 0


@pytest.mark.parametrize("changes", [{}, {"score_cap": 3.0}, {"loop_time": True}])
def test_nobody_waits_for_a_hook(changes: dict[str, Any]) -> None:
    """Also where a hook is shown what the fast path does not form, and changes it."""
    model = make(**changes)
    tokens, counts = tokens_for(model), []
    for hooks in ([], [(lambda name: True, lambda x, hook: x)]):
        with torch.no_grad(), waits() as seen:
            model.run_with_hooks(tokens, fwd_hooks=hooks)
        counts.append(len(seen))
    assert counts[0] == counts[1]
