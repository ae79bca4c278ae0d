"""LoopedCache: what is kept, how it is read, and what it costs."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import TINY, fired, hook_count, make, tiny, tokens_for
from plain import Plain, Tape, weights_of
from transformer_lens import ActivationCache
from transformer_lens.utilities.slice import Slice

from tl_looped import HookNameError, HookSite, InputError, LoopedCache, LoopedModel

EVERY = {"names_filter": lambda _: True}


@pytest.fixture(params=TINY)
def model(request: pytest.FixtureRequest) -> LoopedModel:
    return tiny(request.param)


@pytest.fixture(scope="module")
def huginn() -> LoopedModel:
    return tiny("huginn")


@pytest.fixture(scope="module")
def cache(huginn: LoopedModel) -> LoopedCache:
    return huginn.run_with_cache(tokens_for(huginn), n_loops=4, **EVERY)[1]


# Reading.


@pytest.mark.parametrize(
    ("key", "name"),
    [
        (("resid_post", 1, 2), "blocks.1.loop.2.hook_resid_post"),
        (("resid_post", -1, -1), "blocks.1.loop.3.hook_resid_post"),
        (("pattern", 0, -4), "blocks.0.loop.0.attn.hook_pattern"),
        (("attn_scores", 0, 1), "blocks.0.loop.1.attn.hook_attn_scores"),
        (("q", 1, 0), "blocks.1.loop.0.attn.hook_q"),
        (("rot_k", 1, 0), "blocks.1.loop.0.attn.hook_rot_k"),
        (("attn.hook_z", 1, 0), "blocks.1.loop.0.attn.hook_z"),
        (("pre_linear", 1, 3), "blocks.1.loop.3.mlp.hook_pre_linear"),
        (("post", 0, 3, "mlp"), "blocks.0.loop.3.mlp.hook_post"),
        (("attn_out", 0, 3), "blocks.0.loop.3.hook_attn_out"),
        (("scale", 0, 2, "ln1"), "blocks.0.loop.2.ln1.hook_scale"),
        (("normalized", -2, 2, "ln2_post"), "blocks.0.loop.2.ln2_post.hook_normalized"),
        (("state_pre", 0), "loop.0.hook_state_pre"),
        (("state_post", -1), "loop.3.hook_state_post"),
        (("injection", 2), "loop.2.hook_injection"),
        (("prelude.resid_post", 0), "prelude.0.hook_resid_post"),
        (("coda.pattern", -1), "coda.0.attn.hook_pattern"),
        (("coda.scale", 0, None, "ln1"), "coda.0.ln1.hook_scale"),
        ("embed", "hook_embed"),
        ("state_init", "hook_state_init"),
        ("ln_coda.hook_scale", "ln_coda.hook_scale"),
        ("ln_final.hook_normalized", "ln_final.hook_normalized"),
        ("blocks.1.loop.2.attn.hook_z", "blocks.1.loop.2.attn.hook_z"),
        ("loop.2.hook_state_post", "loop.2.hook_state_post"),
    ],
)
def test_ways_to_read(cache: LoopedCache, key, name: str):
    assert cache[key] is cache.cache_dict[name]
    assert key in cache


@pytest.mark.parametrize(
    ("key", "message"),
    [
        (
            ("resid_post", 1),
            r"'blocks.1.hook_resid_post' fires once in every loop: say which.*Cached loops: 0, 1, 2, 3",
        ),
        ("blocks.1.hook_resid_post", r"fires once in every loop: say which, or take cache.stack for all"),
        ("state_post", r"'hook_state_post' fires once in every loop: say which"),
        (("resid_post", 1, 4), r"loop 4 is out of range: 4 exist"),
        (("resid_post", 2, 0), r"layer 2 is out of range: 2 exist"),
        (("state_post", -5), r"loop -5 is out of range"),
        (("state_post", 0, 1), r"'hook_state_post' belongs to no layer: read it as cache\['state_post', loop\]"),
        (("resid_post", 1, 1.0), r"loop must be an integer, got 1.0 \(float\)"),
        ("pattern", r"'pattern' belongs to a layer: read it as cache\['pattern', layer, loop\]"),
        ("prelude.pattern", r"'prelude.pattern' belongs to a layer: read it as cache\['prelude.pattern', layer\]"),
        (("prelude.pattern", 0, 1), r"the prelude runs once: leave the loop out"),
        (("embed", 0), r"'hook_embed' fires once in a run: read it as cache\['embed'\]"),
        (("nonsense", 0, 0), r"there is no site 'nonsense'"),
        (("resid_pst", 0, 0), r"there is no site 'resid_pst'. Nearest: 'resid_post'"),
        ("blocks.1.loop.7.hook_resid_post", r"is not cached; this site has the loops 0, 1, 2, 3"),
        ("blocks.7.loop.1.hook_resid_post", r"'blocks.7.loop.1.hook_resid_post' is not cached. Nearest: 'blocks"),
        ("loop.0.hook_exit_gate", r"'loop.0.hook_exit_gate' is not cached"),
    ],
)
def test_what_can_not_be_read(cache: LoopedCache, key, message: str):
    with pytest.raises(HookNameError, match=message):
        cache[key]
    assert key not in cache


def test_stacks_have_the_loop_first(cache: LoopedCache, huginn: LoopedModel):
    for layer in (0, 1):
        stacked = cache.stack("pattern", layer)
        assert stacked.shape[0] == 4
        assert all(torch.equal(stacked[t], cache["pattern", layer, t]) for t in range(4))
    assert torch.equal(cache.stack("pattern", -1), cache.stack("pattern", 1))
    every = cache.stack("resid_post")
    assert every.shape[:2] == (4, 2)
    assert all(torch.equal(every[:, layer], cache.stack("resid_post", layer)) for layer in (0, 1))
    assert torch.equal(cache.stack("state_post")[3], cache["state_post", 3])
    assert torch.equal(cache.stack("blocks.1.attn.hook_z"), cache.stack("z", 1))
    assert torch.equal(cache.stack("scale", 1, "ln2")[2], cache["scale", 1, 2, "ln2"])
    assert torch.equal(cache.stack("scale", layer_type="ln2")[2, 1], cache["scale", 1, 2, "ln2"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("exit_gate",), r"'hook_exit_gate' is not cached at any loop"),
        (("embed",), r"'hook_embed' is not cached at any loop|'hook_embed' fires once"),
        (("pattern", 5), r"layer 5 is out of range"),
        (("nonsense",), r"there is no site 'nonsense'"),
    ],
)
def test_what_can_not_be_stacked(cache: LoopedCache, arguments, message: str):
    with pytest.raises(HookNameError, match=message):
        cache.stack(*arguments)


def test_layers_with_different_loops_do_not_stack(huginn: LoopedModel):
    names = ["blocks.0.loop.0.hook_resid_post", "blocks.1.loop.1.hook_resid_post"]
    _, cache = huginn.run_with_cache(tokens_for(huginn), names_filter=names)
    with pytest.raises(HookNameError, match="'blocks.0.hook_resid_post' is cached at the loops 0, not at 1"):
        cache.stack("resid_post")
    assert cache.loops("resid_post", 1) == [1]


def test_some_loops_of_a_cache(cache: LoopedCache):
    some = cache.apply_slice_to_loops([0, -1])
    assert some.loops("resid_post", 0) == [0, 3]
    assert torch.equal(some.stack("resid_post", 0), cache.stack("resid_post", 0)[[0, 3]])
    assert torch.equal(some["embed"], cache["embed"])
    assert torch.equal(some["resid_post", 0, -1], cache["resid_post", 0, 3])
    assert cache.apply_slice_to_loops(2).loops("state_pre") == [2]
    with pytest.raises(HookNameError, match=r"'blocks.0.loop.1.hook_resid_post' is not cached; .* the loops 0, 3"):
        some["resid_post", 0, 1]
    with pytest.raises(HookNameError, match="loop 4 is out of range: 4 exist"):
        cache.apply_slice_to_loops([4])


def test_some_rows_of_a_cache(cache: LoopedCache):
    row = cache.apply_slice_to_batch_dim(1)
    assert not row.has_batch_dim
    assert torch.equal(row["pattern", 0, 2], cache["pattern", 0, 2][1])
    kept = cache.apply_slice_to_batch_dim([1])
    assert isinstance(kept, LoopedCache)
    assert torch.equal(kept.stack("pattern", 0), cache.stack("pattern", 0)[:, 1:])


def test_without_a_batch_axis(huginn: LoopedModel):
    tokens = tokens_for(huginn, batch=1)
    _, with_batch = huginn.run_with_cache(tokens, **EVERY)
    _, without = huginn.run_with_cache(tokens, remove_batch_dim=True, **EVERY)
    assert not without.has_batch_dim
    assert all(torch.equal(without[name], with_batch[name][0]) for name in with_batch)
    removed = huginn.run_with_cache(tokens, **EVERY)[1].remove_batch_dim()
    assert all(torch.equal(removed[name], without[name]) for name in without)
    with pytest.raises(InputError, match="remove_batch_dim needs a batch of one, got 2 prompts"):
        huginn.run_with_cache(tokens_for(huginn), remove_batch_dim=True)


def test_it_is_transformerlens_cache(cache: LoopedCache):
    assert isinstance(cache, ActivationCache)
    assert len(cache) == len(list(cache)) == len(cache.keys()) == len(cache.values())
    assert repr(cache) == (
        f"LoopedCache({len(cache)} activations, n_loops=4, start_at_loop=0, stop_at_loop=4, initial_state=seed 0)"
    )


def test_moving_a_cache(huginn: LoopedModel):
    _, cache = huginn.run_with_cache(tokens_for(huginn), device="meta", names_filter="hook_state_post")
    assert cache["state_post", 0].is_meta
    _, cache = huginn.run_with_cache(tokens_for(huginn), names_filter="hook_state_post")
    moved = cache.to("meta")
    assert isinstance(moved, LoopedCache)
    assert all(value.is_meta for value in moved.values())


# What is kept.


def test_a_cache_holds_what_hooks_see(model: LoopedModel):
    tokens, seen = tokens_for(model), {}
    hooks = [(lambda _: True, lambda x, hook: seen.update({hook.name: x.clone()}))]
    logits = model.run_with_hooks(tokens, n_loops=3, fwd_hooks=hooks)
    cached_logits, cache = model.run_with_cache(tokens, n_loops=3, **EVERY)
    assert torch.equal(logits, cached_logits)
    assert list(cache) == list(seen)
    assert all(torch.equal(cache[name], seen[name]) for name in seen)
    assert not any(value.requires_grad for value in cache.values())
    assert hook_count(model) == 0


def test_by_default_all_but_each_heads_result(huginn: LoopedModel, cache: LoopedCache):
    _, default = huginn.run_with_cache(tokens_for(huginn), n_loops=4)
    assert set(cache) - set(default) == {name for name in cache if name.endswith("hook_result")}


def test_forms_of_a_filter(huginn: LoopedModel):
    tokens = tokens_for(huginn)

    def kept(names_filter, **options) -> list[str]:
        return list(huginn.run_with_cache(tokens, n_loops=3, names_filter=names_filter, **options)[1])

    assert kept("blocks.1.loop.2.hook_resid_post") == ["blocks.1.loop.2.hook_resid_post"]
    assert kept("blocks.1.hook_resid_post") == [f"blocks.1.loop.{t}.hook_resid_post" for t in range(3)]
    names = ("hook_embed", "loop.0.hook_state_pre", "coda.0.attn.hook_pattern")
    assert kept(names) == kept(list(names)) == list(names)
    assert kept(lambda name: name.endswith("loop.1.hook_state_post")) == ["loop.1.hook_state_post"]
    assert kept("hook_state_post", loops=[0, -1]) == ["loop.0.hook_state_post", "loop.2.hook_state_post"]
    assert kept("hook_state_post", loops=range(1, 3)) == ["loop.1.hook_state_post", "loop.2.hook_state_post"]
    assert kept("hook_embed", loops=[]) == ["hook_embed"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"names_filter": "blocks.0.hook_resid_pst"},
            r"no hook point 'blocks.0.hook_resid_pst'. Nearest: 'blocks.0.hook_r",
        ),
        ({"names_filter": ["hook_embed", "loop.4.hook_state_pre"]}, r"nothing to cache at 'loop.4.hook_state_pre'"),
        (
            {"names_filter": "loop.1.hook_state_pre", "loops": [0]},
            r"nothing to cache at 'loop.1.*loops 0 to 3 run.*\[0\]",
        ),
        ({"names_filter": "hook_state_pre", "loops": []}, r"nothing to cache at 'hook_state_pre'"),
        (
            {"names_filter": "coda.0.hook_resid_post", "stop_at_loop": 2},
            r"nothing to cache at 'coda.0.hook_resid_post'",
        ),
        (
            {"names_filter": "hook_state_post", "stop_at_loop": 0},
            r"nothing to cache at 'hook_state_post': no loop runs",
        ),
        ({"names_filter": []}, r"names_filter=\[\] accepts no hook name that this run reaches: loops 0 to 3 run"),
        ({"names_filter": lambda name: False}, r"accepts no hook name that this run reaches"),
        ({"names_filter": lambda name: name == "hook_state_post"}, r"accepts no hook name that this run reaches"),
        ({"loops": [4]}, r"loops 4 is out of range: 4 exist|loop 4 is out of range: 4 exist"),
        ({"loops": [3], "stop_at_loop": 2}, r"loops \[3\] can't be kept: loops 0 to 1 run"),
        ({"incl_bwd": True}, r"incl_bwd runs backward from the mean loss: pass return_type='loss'"),
        (
            {"incl_bwd": True, "return_type": "loss", "loss_per_token": True},
            r"incl_bwd runs backward from the mean loss",
        ),
        ({"incl_bwd": True, "return_type": "loss", "stop_at_loop": 1}, r"incl_bwd .* and no stop_at_loop"),
    ],
)
def test_what_can_not_be_cached(huginn: LoopedModel, options, message: str):
    seen = []
    hooks = [("hook_embed", lambda x, hook: seen.append(hook.name))]
    with huginn.hooks(hooks), pytest.raises(InputError, match=message):
        huginn.run_with_cache(tokens_for(huginn), n_loops=4, **options)
    assert seen == []
    assert hook_count(huginn) == 0


def assert_sliced(model: LoopedModel, pos_slice: Any) -> None:
    tokens = tokens_for(model)
    _, whole = model.run_with_cache(tokens, n_loops=1, **EVERY)
    _, some = model.run_with_cache(tokens, n_loops=1, pos_slice=pos_slice, **EVERY)
    rows = torch.arange(5)[Slice.unwrap(pos_slice).indices(5)]
    for name, value in whole.items():
        axis = {"attn_scores": 2, "pattern": 2}.get(name.rpartition("hook_")[2], 1)
        assert axis == HookSite.parse(name).pos_axis
        assert torch.equal(some[name], value.index_select(axis, rows)), name


def test_some_positions_of_every_site(model: LoopedModel):
    """On the axis that each site's table entry names; queries, for patterns."""
    assert_sliced(model, [3, 0])


@pytest.mark.parametrize("pos_slice", [2, -1, (1, 4), (0, 5, 2), torch.tensor([4, 1]), Slice((2, None))])
def test_forms_of_a_slice(pos_slice):
    assert_sliced(tiny("ouro"), pos_slice)


@pytest.mark.parametrize("pos_slice", [-1, (1, 3)])
def test_a_slice_does_not_hold_the_whole(huginn: LoopedModel, pos_slice):
    _, cache = huginn.run_with_cache(tokens_for(huginn), pos_slice=pos_slice, **EVERY)
    for name, value in cache.items():
        assert value.untyped_storage().nbytes() == value.numel() * value.element_size(), name


def test_gradients_of_every_loop():
    """Under each loop's own name; those of the forward pass, not of a later one."""
    model = make(torch.float64, **TINY["huginn"])
    tokens, tape = tokens_for(model), Tape()
    _, cache = model.run_with_cache(tokens, n_loops=3, return_type="loss", incl_bwd=True, pos_slice=(0, 2))
    weights = {name: weight.requires_grad_() for name, weight in weights_of(model).items()}
    logits = Plain(model.cfg, weights, tape).run(tokens, 3, model.batch(tokens).state)
    F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()).backward()
    for t in range(3):
        wanted = tape.grad(f"blocks.1.loop.{t}.hook_resid_post")[:, :2]
        torch.testing.assert_close(cache["resid_post_grad", 1, t], wanted)
        assert cache[f"blocks.1.loop.{t}.hook_resid_post_grad"] is cache["resid_post_grad", 1, t]
    assert cache.stack("resid_post_grad", 1).shape[0] == 3
    assert cache.stack("state_post_grad").shape[0] == 3
    pattern = cache["pattern_grad", 0, 1]
    torch.testing.assert_close(pattern, tape.grad("blocks.0.loop.1.attn.hook_pattern")[:, :, :2])
    assert hook_count(model) == 0


# What it costs.


def test_hooks_are_registered_once_a_physical_site(huginn: LoopedModel):
    counts = []
    count = ("hook_embed", lambda x, hook: counts.append(hook_count(huginn)))
    for n_loops in (2, 32):
        with huginn.hooks([count]):
            huginn.run_with_cache(
                tokens_for(huginn, pos=2), n_loops=n_loops, names_filter=["hook_state_post", "hook_embed"]
            )
    assert counts == [3, 3]


def test_activations_of_other_loops_are_not_held(huginn: LoopedModel):
    seen: list[weakref.ref[torch.Tensor]] = []
    hooks = [("hook_state_post", lambda x, hook: seen.append(weakref.ref(x.untyped_storage())))]
    with torch.no_grad(), huginn.hooks(hooks):
        _, cache = huginn.run_with_cache(tokens_for(huginn), n_loops=8, names_filter="hook_state_post", loops=[2])
    gc.collect()
    assert list(cache) == ["loop.2.hook_state_post"]
    assert [t for t, storage in enumerate(seen) if storage() is not None] == []  # what is kept is a copy


def test_patterns_are_formed_where_they_are_asked_for(huginn: LoopedModel, monkeypatch: pytest.MonkeyPatch):
    """At one loop of four, and nowhere without a hook."""
    formed = []
    attention = type(huginn.transformer.blocks[0].attn)
    original = attention._explicit
    monkeypatch.setattr(attention, "_explicit", lambda self, *rest: formed.append(rest[-2]) or original(self, *rest))
    tokens = tokens_for(huginn)
    huginn(tokens, n_loops=4)
    huginn.run_with_cache(tokens, n_loops=4, names_filter="hook_state_post")
    assert formed == []
    huginn.run_with_cache(tokens, n_loops=4, names_filter="blocks.0.loop.2.attn.hook_pattern")
    assert formed == [2]
    formed.clear()
    fired(huginn, tokens, n_loops=2)
    assert len(formed) == huginn.cfg.schedule(2).depth


@pytest.mark.parametrize(
    "name",
    [
        *("accumulated_resid", "decompose_resid", "get_full_resid_decomposition", "stack_head_results"),
        *("stack_neuron_results", "stack_activation", "logit_attrs", "compute_head_results", "apply_ln_to_stack"),
        "get_neuron_results",
    ],
)
def test_tools_for_a_feedforward_stream_are_refused(cache: LoopedCache, name: str):
    """They add up layers, which leaves out injection and loop norms, or read a layer without its loop."""
    with pytest.raises(InputError, match=f"{name} adds up a feedforward model's residual stream. In a looped model"):
        getattr(cache, name)("resid_post")
    with pytest.raises(InputError, match="logit_lens adds up a feedforward model's residual stream"):
        cache.logit_lens()
