"""attribution_sweep against central finite differences, against closed forms of linear models, and against patching."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from helpers import hook_count, make, tokens_for
from patching_helpers import (
    CASES,
    CHANGED,
    HEADS,
    LAYER_SITES,
    ONCE_SITES,
    PATTERN,
    POS,
    SITES,
    both_clean,
    by_hand,
    case,
    cells,
    direction,
    everywhere,
    legal_axes,
    prompts,
    run_clean,
    sizes_of,
)
from torch import Tensor

from tl_looped import LoopedModel
from tl_looped.engine.errors import InputError
from tl_looped.engine.network import frozen_weights
from tl_looped.patching import LoopPatchingResult, attribution_sweep, fixed, mean_source, patch_sweep, zero

LOOPS, LENGTH = 2, 4
EXACT = {"rtol": 1e-9, "atol": 1e-9}
STEP = 1e-4


def estimate(model: LoopedModel, site: str, axes: tuple[str, ...], **options: Any) -> LoopPatchingResult:
    _, corrupted = prompts(model, pos=LENGTH)
    options = {"n_loops": LOOPS, "reduce": "none", "progress": False, **options}
    source = options.pop("source", None) or both_clean(model, LENGTH, options["n_loops"])[0]
    metric = options.pop("metric", everywhere(model))
    return attribution_sweep(model, corrupted, source=source, metric=metric, site=site, axes=axes, **options)


def slope(model: LoopedModel, change: dict[str, Tensor], site: str, at: dict[str, int], **how: Any) -> Tensor:
    """By how much the metric of each prompt changes when a cell moves by `change`, from two runs close by."""
    _, corrupted = prompts(model, pos=LENGTH)

    def metric(step: float) -> Tensor:
        logits = by_hand(model, corrupted, lambda name, x: x + step * change[name], LOOPS, site, at, **how)
        return everywhere(model)(logits)

    # of order four in the step
    return (8 * (metric(STEP) - metric(-STEP)) - metric(2 * STEP) + metric(-2 * STEP)) / (12 * STEP)


def check(
    model: LoopedModel, site: str, axes: tuple[str, ...], n: int, dims: Any = None, seed: int = 8, **options: Any
) -> LoopPatchingResult:
    clean, corrupted = both_clean(model, LENGTH, LOOPS)
    change = {name: clean.cache_dict[name] - corrupted.cache_dict[name] for name in clean}
    result = estimate(model, site, axes, **options)
    when = "at" if "loop" in axes else "every"
    for at in cells(sizes_of(model, site, axes, LOOPS, LENGTH), n, seed):
        expected = slope(model, change, site, at, dims=dims, when=when)
        effect = result.effect()[tuple(at.values())]
        tolerance = float(1e-6 * result.effect().abs().max() + 1e-8)
        torch.testing.assert_close(
            effect, expected, rtol=1e-5, atol=tolerance, msg=lambda text, at=at: f"{site} {at}: {text}"
        )
    return result


# Finite differences.


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("sites", [list(SITES)[:8], list(SITES)[8:]])
def test_every_site_agrees_with_finite_differences(as_a_user: None, name: str, sites: list[str]) -> None:
    model = case(name, torch.float64)
    for site in sites:
        axes = max(legal_axes(site), key=len)
        axes = tuple(axis for axis in axes if axis != "source_loop")[:: -1 if site in ("k", "attn_out") else 1]
        result = check(model, site, axes, 1)
        assert result.values.shape == (*sizes_of(model, site, axes, LOOPS, LENGTH).values(), 2)
    assert hook_count(model) == 0


@pytest.mark.parametrize("site", ["resid_mid", "z", "v", "pattern", "post", "state_post", "embed"])
def test_every_set_of_axes_agrees_with_finite_differences(as_a_user: None, site: str) -> None:
    model = case("added", torch.float64)
    sets = [axes for axes in legal_axes(site) if "source_loop" not in axes]
    for number, axes in enumerate(sets):
        order = list(itertools.permutations(axes))
        check(model, site, order[number % len(order)], 1, seed=number)


@pytest.mark.parametrize(
    ("site", "dims", "axes"),
    [
        ("attn.hook_rot_k", HEADS, ("loop", "layer", "head", "pos")),
        ("attn.hook_result", HEADS, ("layer", "head", "loop")),
        ("ln1.hook_scale", POS, ("loop", "layer", "pos")),
        ("ln2_post.hook_normalized", POS, ("loop", "layer", "pos")),
        ("hook_injection_in", POS, ("loop", "pos")),
        ("ln_loop.hook_scale", POS, ("pos", "loop")),
        ("ln_final.hook_normalized", POS, ("pos",)),
    ],
)
def test_any_components_name_is_a_site(site: str, dims: dict[str, int], axes: tuple[str, ...]) -> None:
    check(case("mixed", torch.float64), site, axes, 4, dims)


def test_scores_that_no_query_sees_count_as_nothing() -> None:
    model = case("added", torch.float64)
    axes = ("loop", "layer", "head", "pos", "key")
    result = estimate(model, "attn.hook_attn_scores", axes)
    assert bool(result.values.isfinite().all())
    future = torch.ones(LENGTH, LENGTH).triu(1).bool()
    assert bool((result.effect()[:, :, :, future] == 0).all())
    change = {}
    clean, corrupted = (run_clean(model, tokens, LOOPS) for tokens in prompts(model, pos=LENGTH))
    for name in clean:
        change[name] = (clean.cache_dict[name] - corrupted.cache_dict[name]).nan_to_num()
    at = {"loop": 0, "layer": 1, "head": 2, "pos": 3, "key": 2}
    expected = slope(model, change, "attn.hook_attn_scores", at, dims=PATTERN)
    torch.testing.assert_close(result.effect()[0, 1, 2, 3, 2], expected, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("kind", ["zero", "fixed", "mean"])
def test_other_sources_agree_with_finite_differences(kind: str) -> None:
    model = case("retrofit-tinyllama", torch.float64)
    corrupted = run_clean(model, prompts(model, pos=LENGTH)[1], LOOPS)
    reference = tokens_for(model, 3, LENGTH)
    value = torch.randn(model.cfg.d_head)
    source = {"zero": zero(), "fixed": fixed(value), "mean": mean_source(model, reference, n_loops=LOOPS)}[kind]
    average = run_clean(model, reference, LOOPS)
    change = {}
    for name, x in corrupted.items():
        if name.endswith("hook_z"):
            target = {"zero": torch.zeros_like(x), "fixed": value.to(x).expand_as(x), "mean": average[name].mean(0)}
            change[name] = target[kind] - x
    result = estimate(model, "z", ("loop", "layer", "head"), source=source)
    assert result.made_by["source"] == kind
    for at in cells({"loop": LOOPS, "layer": 2, "head": 4}, 3):
        expected = slope(model, change, "z", at)
        torch.testing.assert_close(result.effect()[tuple(at.values())], expected, rtol=1e-5, atol=1e-7)


# Linear models.


def linear(**changes: Any) -> LoopedModel:
    """Layers that write nothing, and no norm: the state is a linear map of the embedding in every loop."""
    model = make(torch.float64, final_norm=False, **changes)
    with torch.no_grad():
        for stack in (model.transformer.prelude, model.transformer.blocks, model.transformer.coda):
            for block in stack:
                block.attn.o.weight.zero_()
                block.mlp.down.weight.zero_()
    return model


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"n_prelude": 1, "n_coda": 1, "injection": "concat_linear"},
        {"injection": "add", "state_init": "zeros"},
        {"injection": "concat_linear", "state_init": "truncated_normal"},
    ],
)
def test_attribution_of_a_linear_model_is_exact(as_a_user: None, changes: dict[str, Any]) -> None:
    model = linear(**changes)
    metric = direction(model)
    clean, corrupted = prompts(model, pos=LENGTH, changed=LENGTH - 1)
    for source in (run_clean(model, clean, 3), zero(), fixed(torch.randn(16))):
        for site in ("embed", "initial_state", "state", "injection", "resid_pre", "resid_mid", "state_post", "mlp_out"):
            axes = (
                ("pos",) if site in ONCE_SITES else ("loop", "layer", "pos") if site in LAYER_SITES else ("loop", "pos")
            )
            options = {"reduce": "none", "n_loops": 3, "progress": False}
            guess = attribution_sweep(model, corrupted, source=source, metric=metric, site=site, axes=axes, **options)
            truth = patch_sweep(model, corrupted, source=source, metric=metric, site=site, axes=axes, **options)
            torch.testing.assert_close(guess.values, truth.values, **EXACT)
            torch.testing.assert_close(guess.baseline, truth.baseline, **EXACT)
    assert truth.effect().abs().max() > 0.1


def test_every_activation_has_the_gradient_of_its_own_loop() -> None:
    """The state of loop t passes T - t mixings to the read-out, so another loop has another gradient."""
    model, loops = linear(injection="concat_linear"), 3
    clean, corrupted = prompts(model, pos=LENGTH, changed=LENGTH - 1)
    caches = [run_clean(model, tokens, loops) for tokens in (clean, corrupted)]
    mix = model.transformer.injection.weight[:, : model.cfg.d_model].T.detach()
    unit = torch.eye(model.cfg.d_vocab, dtype=torch.float64)[3]
    options = {"axes": ("loop",), "n_loops": loops, "reduce": "none", "progress": False}
    result = attribution_sweep(
        model, corrupted, source=caches[0], metric=lambda logits: logits[:, -1] @ unit, site="state", **options
    )
    changes = [(caches[0]["state_pre", t] - caches[1]["state_pre", t])[:, -1] for t in range(loops)]
    grads = [torch.linalg.matrix_power(mix, loops - t) @ model.W_U.detach() @ unit for t in range(loops)]
    table = torch.stack([torch.stack([change @ grad for grad in grads]) for change in changes])  # [loop, loop', batch]
    torch.testing.assert_close(result.effect(), table.diagonal(dim1=0, dim2=1).T, **EXACT)
    wrong = table[~torch.eye(loops, dtype=torch.bool)].unflatten(0, (loops, loops - 1))
    assert bool(((wrong - result.effect()[:, None]).abs() > 1e-3).all())


# Integrated gradients.


@pytest.mark.parametrize("name", ["huginn", "ouro", "added", "retrofit-olmo2"])
def test_integrated_gradients_converge_to_the_whole_difference(as_a_user: None, name: str) -> None:
    """Along the straight line from the corrupted to the clean embeddings, by the fundamental theorem of calculus."""
    model = case(name, torch.float64)
    clean, corrupted = prompts(model, pos=LENGTH)
    with torch.no_grad():
        whole = everywhere(model)(model(clean, LOOPS)) - everywhere(model)(model(corrupted, LOOPS))
    errors = []
    for n_steps in (1, 8, 64):
        effect = estimate(model, "embed", ("pos",), n_steps=n_steps).effect()
        assert bool((effect[torch.arange(LENGTH) != CHANGED] == 0).all())
        errors.append((effect.sum(0) - whole).abs().max().item())
    assert errors[2] < 1e-2 * whole.abs().max()
    assert errors[2] < 0.2 * errors[1] < errors[0]


def test_integrated_gradients_are_means_over_runs_on_the_way() -> None:
    model = case("huginn", torch.float64)
    clean, corrupted = prompts(model, pos=LENGTH)
    caches = [run_clean(model, tokens, LOOPS) for tokens in (clean, corrupted)]
    embed = [cache["embed"] for cache in caches]
    metric, grads = everywhere(model), []

    def keep(grad: Tensor, hook: Any) -> None:
        grads.append(grad)

    for i in range(3):
        between = embed[1] + (i + 0.5) / 3 * (embed[0] - embed[1])
        hooks = [("hook_embed", lambda x, hook, e=between: e.clone().requires_grad_())]
        with model.hooks(hooks, [("blocks.1.loop.0.attn.hook_z", keep)]):
            metric(model(corrupted, LOOPS)).sum().backward()
    model.zero_grad()
    change = caches[0]["z", 1, 0] - caches[1]["z", 1, 0]
    expected = (change * torch.stack(grads).mean(0)).sum((1, 3)).T
    result = estimate(model, "z", ("loop", "layer", "head"), n_steps=3)
    torch.testing.assert_close(result.effect()[0, 1], expected, **EXACT)
    assert result.made_by["method"] == "integrated gradients, 3 steps"


# What it returns and leaves.


def test_a_prompts_values_do_not_depend_on_the_other_prompts() -> None:
    model = case("huginn", torch.float64)
    clean, corrupted = prompts(model, batch=3, pos=LENGTH)
    options = {"n_loops": LOOPS, "reduce": "none", "progress": False, "axes": ("pos", "loop", "layer", "head")}
    for n_steps in (None, 2):
        whole, *ones = (
            attribution_sweep(
                model,
                corrupted[rows],
                source=run_clean(model, clean[rows], LOOPS),
                metric=everywhere(model),
                site="q",
                n_steps=n_steps,
                **options,
            )
            for rows in (slice(None), *(slice(i, i + 1) for i in range(3)))
        )
        torch.testing.assert_close(whole.values, torch.cat([one.values for one in ones], dim=-1), **EXACT)
        torch.testing.assert_close(whole.baseline, torch.cat([one.baseline for one in ones], dim=-1), **EXACT)


def test_the_three_ways_to_reduce_agree() -> None:
    model, metric = case("ouro-gqa", torch.float64), everywhere(case("ouro-gqa", torch.float64))
    kept = estimate(model, "z", ("head", "loop", "layer"))
    average = estimate(model, "z", ("head", "loop", "layer"), reduce="mean")
    scalar = estimate(model, "z", ("head", "loop", "layer"), reduce="scalar", metric=lambda x: metric(x).mean())
    assert kept.values.shape == (4, 2, 2, 2) and average.values.shape == scalar.values.shape == (4, 2, 2)
    for one in (average, scalar):
        assert one.reduced and one.baseline.shape == ()
        torch.testing.assert_close(one.values, kept.mean(), **EXACT)
        torch.testing.assert_close(one.effect(), kept.effect().mean(-1), **EXACT)


def test_the_result_is_laid_out_as_that_of_patching() -> None:
    model = case("retrofit-llama", torch.float64)
    clean, corrupted = prompts(model, pos=LENGTH)
    options = {"metric": everywhere(model), "site": "v", "axes": ("layer", "pos", "loop", "head"), "reduce": "none"}
    options |= {"source": run_clean(model, clean, LOOPS), "progress": False}
    guess, truth = (call(model, corrupted, LOOPS, **options) for call in (attribution_sweep, patch_sweep))
    assert guess.values.shape == truth.values.shape and guess.index_df.equals(truth.index_df)
    assert guess.axis_names == truth.axis_names and guess.metric_names == truth.metric_names
    torch.testing.assert_close(guess.baseline, truth.baseline, **EXACT)
    assert guess.made_by["method"] == "attribution" and guess.site == "v"
    assert len(guess.to_dataframe()) == guess.values.numel()
    ranks = [one.effect().mean(-1).flatten().argsort().argsort().double() for one in (guess, truth)]
    assert torch.corrcoef(torch.stack(ranks))[0, 1] > 0.5


def test_nothing_is_left_on_weights() -> None:
    model = make(n_prelude=1, injection="concat_linear", state_init="truncated_normal")
    frozen = model.transformer.embed.weight.requires_grad_(False)
    estimate(model, "resid_pre", ("loop", "layer", "pos"), n_steps=2)
    assert all(weight.grad is None for weight in model.parameters())
    flags = {name: weight.requires_grad for name, weight in model.named_parameters()}
    assert not frozen.requires_grad and sum(flags.values()) == len(flags) - 1

    def fails(logits: Tensor) -> Tensor:
        if logits.requires_grad:
            raise RuntimeError("the metric broke")
        return logits.sum()

    with pytest.raises(RuntimeError, match="the metric broke"):
        estimate(model, "resid_pre", ("loop",), metric=fails, reduce="scalar")
    assert {name: weight.requires_grad for name, weight in model.named_parameters()} == flags
    assert hook_count(model) == 0
    with pytest.raises(KeyboardInterrupt), frozen_weights(model):
        assert not any(weight.requires_grad for weight in model.parameters())
        raise KeyboardInterrupt
    assert {name: weight.requires_grad for name, weight in model.named_parameters()} == flags


def test_it_works_where_gradients_are_off_and_leaves_a_given_state_alone() -> None:
    model = case("huginn", torch.float64)
    clean, corrupted = prompts(model, pos=LENGTH)
    with torch.no_grad():
        state = model(clean, stop_at_loop=1, seed=5)
        cache = run_clean(model, clean, LOOPS, initial_state=state)
        before = state.clone()
        options = {"source": cache, "metric": everywhere(model), "site": "state", "axes": ("loop", "pos")}
        result = attribution_sweep(model, corrupted, LOOPS, **options, initial_state=state, reduce="none")
        assert not torch.is_grad_enabled()
    assert torch.equal(state, before) and not state.requires_grad
    assert not result.values.requires_grad
    assert bool((result.effect()[0] == 0).all())  # the state that enters loop 0 is the same
    given = state.clone().requires_grad_()
    attribution_sweep(
        model,
        corrupted,
        source=cache,
        metric=everywhere(model),
        site="state",
        axes=("loop",),
        n_loops=LOOPS,
        initial_state=given,
        reduce="none",
    )
    assert given.grad is None and given.requires_grad


def test_it_refuses_where_there_can_be_no_gradients() -> None:
    model = case("bare")
    with torch.inference_mode():
        cache = run_clean(model, prompts(model, pos=LENGTH)[0], LOOPS)
        with pytest.raises(InputError, match=r"call it outside torch.inference_mode\(\); torch.no_grad\(\) is fine"):
            estimate(model, "state", ("loop",), source=cache)
    assert estimate(model, "state", ("loop",), source=cache, n_steps=2).values.shape == (2, 2)


@pytest.mark.parametrize("name", ["huginn", "ouro"])
def test_half_precision_gives_about_the_same(name: str) -> None:
    half, full = case(name, torch.bfloat16), case(name, torch.float64)
    for function in (attribution_sweep, patch_sweep):
        effects = []
        for model in (half, full):
            clean, corrupted = prompts(model, pos=LENGTH)
            what = {"source": run_clean(model, clean, LOOPS), "metric": direction(model), "axes": ("loop", "layer")}
            what |= {"site": "attn.hook_attn_scores", "reduce": "none", "progress": False}
            result = function(model, corrupted, LOOPS, **what)
            effects.append(result.effect().double())
        assert (effects[0] - effects[1]).norm() < 0.3 * effects[1].norm()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"axes": ("source_loop", "loop")}, "attribution pairs each loop with itself: leave 'source_loop' out"),
        (
            {"n_steps": 2, "source": zero()},
            "n_steps integrates from the corrupted prompt to another: pass that prompt's",
        ),
        ({"n_steps": 0}, "n_steps must be at least 1, got 0"),
        ({"metric": {"one": lambda x: x.sum()}}, r"attribution_sweep takes one metric, not a mapping of \['one'\]"),
        ({"metric": lambda x: x.detach().sum((1, 2))}, "in a way that can be differentiated"),
        ({"metric": lambda x: (x > 0).sum((1, 2))}, "in a way that can be differentiated"),
        ({"metric": lambda x: x.argmax(-1).sum(-1)}, "in a way that can be differentiated"),
        (
            {"site": "exit_gate", "axes": ("loop",)},
            "a backward hook is on 'loop.0.hook_exit_gate', which no output of the model reads",
        ),
        ({"site": "resid_pre", "axes": ("head", "loop")}, "site 'resid_pre' has no axis 'head'"),
        ({"metric": lambda x: x.sum()}, r"must return shape \(2,\) with reduce='none'"),
        ({"metric": lambda x: x.sum((1, 2)) / 0 * 0}, "gives NaN"),
    ],
)
def test_what_attribution_can_not_do_is_refused(as_a_user: None, options: dict[str, Any], message: str) -> None:
    model = case("ouro")
    with pytest.raises(InputError, match=message):
        estimate(model, **{"site": "state", "axes": ("loop",), **options})
    assert hook_count(model) == 0 and all(weight.requires_grad for weight in model.parameters())


def test_n_steps_needs_the_clean_embedding() -> None:
    model = case("ouro")
    _, cache = model.run_with_cache(prompts(model, pos=LENGTH)[0], LOOPS, names_filter="hook_state_pre")
    with pytest.raises(InputError, match="the source's cache has no 'hook_embed'"):
        estimate(model, "state", ("loop",), source=cache, n_steps=2)
    assert estimate(model, "state", ("loop",), source=cache).values.shape == (2, 2)
