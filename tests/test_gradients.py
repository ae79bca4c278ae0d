"""Backward hooks: each loop's activation gets its own gradient, and no other loop's."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from helpers import TINY, hook_count, noise_like, tiny, tokens_for
from plain import Plain, Tape, weights_of

from tl_looped import HookNameError, InputError, LoopedModel

SITES = ["loop.{}.hook_state_pre", "blocks.0.loop.{}.hook_resid_pre", "blocks.1.loop.{}.attn.hook_pattern"]
SITES += ["blocks.1.loop.{}.attn.hook_v", "blocks.0.loop.{}.mlp.hook_post", "loop.{}.hook_state_post"]


@pytest.fixture(params=TINY)
def model(request: pytest.FixtureRequest) -> Iterator[LoopedModel]:
    model = tiny(request.param, torch.float64)
    yield model
    assert hook_count(model) == 0
    model.zero_grad()


@pytest.fixture
def tokens(model: LoopedModel) -> torch.Tensor:
    return tokens_for(model, batch=2, pos=4)


def gradients(model: LoopedModel, tokens: torch.Tensor, names: list[str], n_loops: int = 3) -> dict[str, torch.Tensor]:
    """What backward hooks on these names are given, by the name that the hook was told."""
    found: dict[str, torch.Tensor] = {}

    def keep(grad, hook):
        assert hook.name not in found
        found[hook.name] = grad.clone()

    loss = model.run_with_hooks(tokens, n_loops, return_type="loss", bwd_hooks=[(name, keep) for name in names])
    loss.backward()
    return found


def plain_tape(model: LoopedModel, tokens: torch.Tensor, n_loops: int = 3) -> Tape:
    tape = Tape()
    weights = {name: weight.requires_grad_() for name, weight in weights_of(model).items()}
    state = model.batch(tokens).state  # one that is drawn comes from nothing, and has a gradient all the same
    state = None if state is None else state.requires_grad_()
    logits = Plain(model.cfg, weights, tape).run(tokens, n_loops, state)
    F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()).backward()
    return tape


def test_every_loop_gets_its_own_gradient(model, tokens):
    """Named with the loop or without, one site or several that the same tensor passes."""
    tape = plain_tape(model, tokens)
    names = [site.format(t) for site in SITES for t in range(3)]
    indexed = gradients(model, tokens, names)
    unindexed = gradients(model, tokens, [site.replace("loop.{}.", "") for site in SITES])
    assert set(indexed) == set(unindexed)
    for name in names:
        wanted = tape.grad(name)
        torch.testing.assert_close(indexed[name], wanted, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(unindexed[name], wanted, rtol=1e-10, atol=1e-12)
    loops = [tape.grad(f"loop.{t}.hook_state_post") for t in range(3)]
    assert not any(torch.allclose(loops[s], loops[t]) for s, t in ((0, 1), (1, 2), (0, 2)))


def test_gradients_come_from_the_last_loop_to_the_first(model, tokens):
    names = list(gradients(model, tokens, ["hook_state_post"]))
    assert names == [f"loop.{t}.hook_state_post" for t in (2, 1, 0)]


def test_a_function_on_names_chooses_loops_of_gradients(model, tokens):
    found = []
    hooks = [(lambda name: name.endswith("loop.1.hook_resid_post"), lambda grad, hook: found.append(hook.name))]
    model.run_with_hooks(tokens, n_loops=3, return_type="loss", bwd_hooks=hooks).backward()
    assert sorted(found) == ["blocks.0.loop.1.hook_resid_post", "blocks.1.loop.1.hook_resid_post"]


@pytest.mark.parametrize("site", SITES)
def test_a_gradient_predicts_a_finite_difference(model, tokens, site):
    """The same move at one loop, forward and by the gradient: predicted effect equals measured effect."""
    name, step = site.format(1), 1e-6
    grad = gradients(model, tokens, [name])[name]
    direction = noise_like(grad)
    if "pattern" in site:
        direction = direction.tril()

    def loss(size: float) -> float:
        hooks = [(name, lambda x, hook: x + size * direction)]
        with torch.no_grad():
            return model.run_with_hooks(tokens, n_loops=3, return_type="loss", fwd_hooks=hooks).item()

    measured = (loss(step) - loss(-step)) / (2 * step)
    assert measured == pytest.approx(float((grad * direction).sum()), rel=1e-5, abs=1e-8)


def test_editing_a_gradient_at_one_loop(model, tokens):
    """A gradient cut at loop 1 leaves loop 0 nothing, where no other way leads there."""
    cut = [("loop.1.hook_state_pre", lambda grad, hook: torch.zeros_like(grad))]
    seen = {}
    with model.hooks(bwd_hooks=[*cut, ("hook_state_post", lambda grad, hook: seen.update({hook.loop: grad}))]):
        model(tokens, n_loops=3, return_type="loss").backward()
    assert float(seen[0].abs().max()) == 0
    assert float(seen[1].abs().max()) > 0
    whole = gradients(model, tokens, ["hook_state_post"])
    assert torch.equal(seen[2], whole["loop.2.hook_state_post"])


def test_gradient_hooks_of_one_site_see_each_others_edits(model, tokens):
    seen = []
    name = "blocks.0.loop.1.hook_resid_post"
    plain = gradients(model, tokens, [name])[name]
    hooks = [
        (name, lambda grad, hook: 2 * grad),
        (name, lambda grad, hook: (grad + 1,)),  # TransformerLens's backward hooks may return a tuple of one
        (name, lambda grad, hook: seen.append(grad)),
    ]
    model.run_with_hooks(tokens, n_loops=3, return_type="loss", bwd_hooks=hooks).backward()
    torch.testing.assert_close(seen[0], 2 * plain + 1)


def test_a_gradient_of_another_shape_is_refused(model, tokens):
    name = "blocks.0.loop.1.hook_resid_post"
    loss = model.run_with_hooks(tokens, return_type="loss", bwd_hooks=[(name, lambda grad, hook: grad[:1])])
    with pytest.raises(
        InputError, match=r"the hook on 'blocks.0.loop.1.hook_resid_post \(gradient\)' returned shape \(1,"
    ):
        loss.backward()


def test_a_backward_hook_belongs_to_its_run(model, tokens):
    """It acts on the graph of the run it was there for, also once it left the model, and on no other run's."""
    seen = []
    hooks = [("loop.1.hook_state_post", lambda grad, hook: seen.append(hook.name))]
    before = model(tokens, return_type="loss")
    hooked = model.run_with_hooks(tokens, return_type="loss", bwd_hooks=hooks)
    assert hook_count(model) == 0
    after = model(tokens, return_type="loss")
    for loss in (before, after):
        loss.backward()
    assert seen == []
    hooked.backward()
    assert seen == ["loop.1.hook_state_post"]


def test_watching_gradients_changes_nothing(model, tokens):
    def weights_gradients(bwd_hooks) -> dict[str, torch.Tensor]:
        model.zero_grad()
        model.run_with_hooks(tokens, return_type="loss", bwd_hooks=bwd_hooks).backward()
        return {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.grad is not None}

    watched = weights_gradients([(lambda _: True, lambda grad, hook: None)])
    torch.testing.assert_close(watched, weights_gradients([]), rtol=1e-10, atol=1e-12)
    assert torch.equal(
        model(tokens), model.run_with_hooks(tokens, bwd_hooks=[(lambda _: True, lambda grad, hook: None)])
    )


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize(
    "site", ["attn.hook_attn_scores", "attn.hook_pattern", "attn.hook_result", "{}.hook_scale", "{}.hook_normalized"]
)
def test_a_detached_value_stops_the_gradient(model, tokens, site, frozen):
    """Freezing attention or norms: the output stays, to the bit; the gradient through the site does not.

    So also where the weights take no gradients, and the explicit value then has none to give.
    """
    name = "blocks.1.loop.1." + site.format("ln1_post" if model.cfg.norm_placement == "output" else "ln1")
    state = noise_like(model(tokens, stop_at_loop=0)).requires_grad_()
    weights = {key: weight.requires_grad_(not frozen) for key, weight in weights_of(model).items()}
    plain = Plain(
        model.cfg, weights, lambda at, x: state if at == "hook_state_init" else x.detach() if at == name else x
    )
    logits = plain.run(tokens, 3, state)
    loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
    leaves = [state, *(() if frozen else (weights["blocks.0.attn.q.weight"], weights["blocks.1.attn.v.weight"]))]
    wanted = torch.autograd.grad(loss, leaves)

    model = copy.deepcopy(model).requires_grad_(not frozen)
    options = {"n_loops": 3, "initial_state": state, "return_type": "loss"}
    found = model.run_with_hooks(tokens, fwd_hooks=[(name, lambda x, hook: x.detach())], **options)
    assert torch.equal(found, model(tokens, **options))
    blocks = model.transformer.blocks
    leaves = [state, *(() if frozen else (blocks[0].attn.q.weight, blocks[1].attn.v.weight))]
    torch.testing.assert_close(torch.autograd.grad(found, leaves), wanted, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_a_backward_hook_without_gradients_is_refused(model, tokens, mode):
    with mode(), pytest.raises(InputError, match=r"a backward hook is registered, but gradients are off"):
        model.run_with_hooks(tokens, bwd_hooks=[("hook_state_post", lambda grad, hook: None)])


# Where there is no gradient by itself.


@pytest.mark.parametrize("given", [False, True])
@pytest.mark.parametrize("frozen", [False, True])
def test_a_stack_of_gradients_has_every_loop(model, tokens, given, frozen):
    """That of the first state too, drawn or given, and with frozen weights; the caller's tensors stay as they are."""
    model = copy.deepcopy(model).requires_grad_(not frozen)
    state = noise_like(model(tokens, stop_at_loop=0)) if given else model.batch(tokens).state
    tape, weights = Tape(), {name: weight.requires_grad_() for name, weight in weights_of(model).items()}
    first = None if state is None else state.clone().requires_grad_()
    plain = Plain(model.cfg, weights, lambda at, x: first if at == "hook_state_init" and given else tape(at, x))
    logits = plain.run(tokens, 3, first)
    F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()).backward()
    options = {"initial_state": state} if given else {}
    loss, cache = model.run_with_cache(tokens, n_loops=3, return_type="loss", incl_bwd=True, **options)
    for name in ("state_pre", "injection", "state_post"):
        grads = cache.stack(f"{name}_grad")
        assert grads.shape == cache.stack(name).shape
        for t in range(3):
            torch.testing.assert_close(grads[t], tape.grad(f"loop.{t}.hook_{name}"), rtol=1e-9, atol=1e-12)
    assert float(cache["state_init_grad"].abs().max()) > 0
    assert torch.equal(loss, model(tokens, n_loops=3, return_type="loss", **options))
    if given:
        assert (state.requires_grad, state.grad) == (False, None)


@pytest.mark.parametrize("name", ["hook_embed", "blocks.0.loop.0.ln1.hook_scale", "blocks.1.loop.2.attn.hook_pattern"])
def test_a_backward_hook_fires_with_frozen_weights(model, tokens, name):
    if model.cfg.norm_placement == "output":
        name = name.replace("ln1", "ln1_post")
    wanted = gradients(model, tokens, [name])[name]
    found = gradients(copy.deepcopy(model).requires_grad_(False), tokens, [name])[name]
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-12)


def test_a_stack_without_the_gradient_of_a_loop_is_refused(model, tokens):
    """Where a hook cut the graph no gradient comes to the loops before, and the rest is no stack."""
    with model.hooks([("loop.1.hook_state_pre", lambda x, hook: x.detach())]):
        _, cache = model.run_with_cache(tokens, n_loops=3, return_type="loss", incl_bwd=True)
    message = (
        r"'hook_state_post_grad' is cached at the loops 1, 2, not at 0; no gradient came there. A stack has all loops"
    )
    with pytest.raises(HookNameError, match=message):
        cache.stack("state_post_grad")
    assert torch.equal(cache.stack("state_post_grad", loops=[2, 1])[0], cache["state_post_grad", 2])
    assert cache.stack("state_post").shape[0] == 3


def test_a_gradient_that_nothing_can_have_is_refused():
    """The exit gate is computed beside the output: no gradient of it comes there."""
    model, seen = tiny("ouro"), []
    tokens, gate = tokens_for(model), "loop.1.hook_exit_gate"
    for name in (gate, "hook_exit_gate"):
        hooks = {"fwd_hooks": [("hook_embed", lambda x, hook: seen.append(x))]}
        message = rf"a backward hook is on '{name}', which no output of the model reads, so no gradient comes there"
        with pytest.raises(HookNameError, match=message):
            model.run_with_hooks(tokens, bwd_hooks=[(name, lambda grad, hook: None)], **hooks)
    with pytest.raises(HookNameError, match="accepts no hook name that this run reaches"):
        model.run_with_hooks(tokens, bwd_hooks=[(lambda name: name.endswith("exit_gate"), lambda grad, hook: None)])
    assert seen == []
    _, cache = model.run_with_cache(tokens, return_type="loss", incl_bwd=True)
    assert "exit_gate" in {name.rpartition("hook_")[2] for name in cache}
    assert not any("exit_gate_grad" in name for name in cache)
    model.zero_grad()


def test_stacks_of_some_loops(model, tokens):
    """A cache of some loops stacks these; a site that lacks one of them does not, unless loops= says which."""
    _, cache = model.run_with_cache(tokens, n_loops=4, loops=[0, -1])
    assert cache.kept_loops == (0, 3)
    assert torch.equal(cache.stack("state_post")[1], cache["state_post", 3])
    _, cache = model.run_with_cache(tokens, n_loops=4, names_filter=lambda name: "loop.2" in name or "loop.3" in name)
    with pytest.raises(HookNameError, match=r"cached at the loops 2, 3, not at 0, 1. A stack has .* loops=\[2, 3\]\)"):
        cache.stack("state_post")
    assert torch.equal(cache.stack("state_post", loops=[-1, 2])[1], cache["state_post", 2])
    _, cache = model.run_with_cache(
        tokens,
        4,
        initial_state=model(tokens, n_loops=4, stop_at_loop=2),
        start_at_loop=2,
        names_filter="hook_state_pre",
    )
    assert cache.kept_loops == (2, 3)
    assert torch.equal(cache.stack("state_pre")[0], cache["state_pre", 2])


def test_stacks_of_some_layers(model, tokens):
    """Column i of a stack is layer i, or the i-th of those asked for."""
    _, cache = model.run_with_cache(tokens, names_filter="blocks.1.hook_resid_post")
    with pytest.raises(HookNameError, match=r"'blocks.0.hook_resid_post' is not cached at any loop"):
        cache.stack("resid_post")
    assert torch.equal(cache.stack("resid_post", [1])[:, 0], cache.stack("resid_post", 1))
    _, cache = model.run_with_cache(tokens)
    assert torch.equal(cache.stack("resid_post", [1, 0]), cache.stack("resid_post").flip(1))
