"""What patch_sweep writes (sources), what it measures (metrics), and what it returns."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from helpers import make, noise_like, tokens_for, word_tokenizer
from patching_helpers import CHANGED, by_hand, case, cells, everywhere, prompts, run_clean, sizes_of
from torch import Tensor
from transformer_lens.patching import PatchingResult, make_df_from_ranges

from tl_looped import LoopedModel
from tl_looped.engine.errors import InputError
from tl_looped.engine.schedule import HookSite
from tl_looped.patching import (
    LoopPatchingResult,
    Receiver,
    Sender,
    Source,
    attribution_sweep,
    fixed,
    mean_source,
    patch_sweep,
    path_patch,
    zero,
)

EXACT = {"rtol": 1e-9, "atol": 1e-10}
LENGTH = 4
NAMES = ["huginn", "ouro-gqa", "added"]


def check(
    model: LoopedModel,
    source: Any,
    give: Callable[[str, Tensor], Tensor],
    site: str,
    axes: tuple[str, ...],
    n: int = 3,
    corrupted: Tensor | None = None,
    **how: Any,
) -> LoopPatchingResult:
    """Sweep with a source, and do some cells by hand with `give`."""
    corrupted = prompts(model, pos=LENGTH)[1] if corrupted is None else corrupted
    options = {"n_loops": 2, "reduce": "none", "progress": False}
    result = patch_sweep(
        model, corrupted, source=source, metric=everywhere(model), site=site, axes=axes, **options, **how
    )
    for at in cells(sizes_of(model, site, axes, 2, corrupted.shape[1]), n):
        logits = by_hand(model, corrupted, give, 2, site, at, **how)
        torch.testing.assert_close(result.values[tuple(at.values())], everywhere(model)(logits), **EXACT)
    assert result.effect().abs().max() > 1e-3
    return result


# Sources.


@pytest.mark.parametrize("name", NAMES)
def test_ablation_with_zeros(name: str) -> None:
    model = case(name, torch.float64)
    for site, axes in (
        ("z", ("loop", "layer", "head")),
        ("mlp_out", ("loop", "layer")),
        ("pattern", ("head", "loop", "layer", "key")),
        ("state", ("loop", "pos")),
        ("embed", ("pos",)),
    ):
        result = check(model, zero(), lambda name, x: torch.zeros_like(x), site, axes)
        assert result.made_by["source"] == "zero"


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("per_position", [True, False])
def test_ablation_with_a_mean(name: str, per_position: bool) -> None:
    model = case(name, torch.float64)
    reference = tokens_for(model, batch=5, pos=LENGTH)
    cache = run_clean(model, reference, 2)

    def give(name: str, x: Tensor) -> Tensor:
        average = cache[name].mean(0, keepdim=True)
        return (average if per_position else average.mean(1, keepdim=True)).expand_as(x)

    source = mean_source(model, reference, 2, per_position=per_position)
    for site, axes in (("z", ("loop", "layer", "head", "pos")), ("resid_mid", ("loop", "layer")), ("state", ("loop",))):
        check(model, source, give, site, axes)
    check(model, source, give, "state_post", ("source_loop", "loop"))
    only = mean_source(model, reference, 2, names_filter=lambda name: "loop.1" in name, per_position=per_position)
    check(model, only, give, "v", ("layer", "loop"), source_loop=1)
    assert check(model, source, give, "q", ("loop",)).made_by["source"] == "mean"


@pytest.mark.parametrize("name", NAMES)
def test_a_mean_of_patterns_is_a_pattern_that_sees_no_future(name: str) -> None:
    model = case(name, torch.float64)
    reference = tokens_for(model, batch=5, pos=LENGTH)
    cache = run_clean(model, reference, 2)
    source = mean_source(model, reference, n_loops=2)
    check(model, source, lambda name, x: cache[name].mean(0, keepdim=True).expand_as(x), "pattern", ("loop", "layer"))
    site = HookSite("attn.hook_pattern", "blocks", 1, 1)
    given = source.values(site, torch.zeros(2, model.cfg.n_heads, LENGTH, LENGTH, dtype=torch.float64))
    assert given.triu(1).abs().max() == 0
    torch.testing.assert_close(given.sum(-1), torch.ones(2, model.cfg.n_heads, LENGTH, dtype=torch.float64))


def test_a_mean_of_half_precision_is_taken_in_float32() -> None:
    model = make(torch.bfloat16)
    reference = tokens_for(model, batch=7, pos=3)
    cache = run_clean(model, reference, 2)
    site = HookSite("hook_resid_post", "blocks", 0, 1)
    for per_position, axes in ((True, (0,)), (False, (0, 1))):
        source = mean_source(model, reference, n_loops=2, per_position=per_position)
        given = source.values(site, torch.zeros(1, 3, model.cfg.d_model))
        expected = cache[site.name].double().mean(axes, keepdim=True).expand(1, 3, -1)
        torch.testing.assert_close(given.double(), expected, atol=1e-6, rtol=1e-5)


def test_a_mean_over_positions_serves_prompts_of_any_length() -> None:
    model = case("bare", torch.float64)
    reference = tokens_for(model, batch=3, pos=6)
    cache = run_clean(model, reference, 2)
    source = mean_source(model, reference, n_loops=2, per_position=False)
    check(
        model, source, lambda name, x: cache[name].mean((0, 1), keepdim=True).expand_as(x), "resid_pre", ("loop", "pos")
    )


def test_a_mean_of_texts_is_that_of_their_tokens() -> None:
    model = make(torch.float64, word_tokenizer())
    texts, corrupted = ["a b c", "d e f", "a a a"], prompts(model, pos=3)[1]
    results = [
        patch_sweep(
            model,
            corrupted,
            source=mean_source(model, one),
            metric=everywhere(model),
            site="z",
            axes=("loop",),
            reduce="mean",
            progress=False,
        )
        for one in (texts, model.to_tokens(texts))
    ]
    assert torch.equal(results[0].values, results[1].values)


@pytest.mark.parametrize("name", NAMES)
def test_a_given_tensor_is_spread_over_the_activation(name: str) -> None:
    model = case(name, torch.float64)
    cfg = model.cfg
    for values, site, axes in (
        (torch.randn(cfg.d_model), "resid_post", ("loop", "layer", "pos")),
        (torch.randn(2, LENGTH, cfg.n_heads, cfg.d_head, dtype=torch.float64), "z", ("loop", "head")),
        (torch.ones(()), "post", ("layer", "loop", "neuron")),
        (torch.eye(LENGTH), "pattern", ("loop", "layer", "head")),
    ):
        check(model, fixed(values), lambda name, x, v=values: v.to(x).expand_as(x), site, axes)


def test_resampling_from_any_other_prompt() -> None:
    model = case("retrofit-olmo2", torch.float64)
    cache = run_clean(model, tokens_for(model, pos=LENGTH, seed=99), 2)
    check(model, cache, lambda name, x: cache[name], "k", ("loop", "layer", "head", "pos"))


def test_a_source_of_ones_own() -> None:
    model = case("ouro", torch.float64)
    double = Source("doubled", lambda site, x: 2 * x)
    result = check(model, double, lambda name, x: 2 * x, "z", ("loop", "layer", "head"))
    assert result.made_by["source"] == "doubled"


def test_a_source_learns_for_which_site_and_sees_the_running_activation() -> None:
    """With when="every" a later loop's activation has been changed by the patches before it."""
    model = case("ouro", torch.float64)
    half = Source("halved", lambda site, x: x / 2)
    check(model, half, lambda name, x: x / 2, "state_post", ("pos",), when="every")
    check(model, half, lambda name, x: x / 2, "resid_mid", ("loop", "pos"), when="from")


def test_a_cache_of_half_precision_serves_a_model_of_full_precision() -> None:
    model = case("ouro")
    clean, corrupted = prompts(model, pos=LENGTH)
    cache, half = run_clean(model, clean, 2), run_clean(model, clean, 2)
    half.cache_dict = {name: tensor.half() for name, tensor in half.cache_dict.items()}
    results = [
        patch_sweep(
            model,
            corrupted,
            source=one,
            metric=everywhere(model),
            site="z",
            axes=("loop",),
            reduce="none",
            n_loops=2,
            progress=False,
        )
        for one in (cache, half)
    ]
    assert results[1].values.dtype == torch.float32
    torch.testing.assert_close(results[0].values, results[1].values, rtol=1e-2, atol=1e-2)


# Metrics.


def run_sweep(
    model: LoopedModel, metric: Any, reduce: str, axes: tuple[str, ...] = ("loop", "pos")
) -> LoopPatchingResult:
    clean, corrupted = prompts(model, batch=3, pos=LENGTH)
    cache = run_clean(model, clean)
    return patch_sweep(
        model, corrupted, source=cache, metric=metric, site="resid_pre", axes=axes, reduce=reduce, progress=False
    )


def first(logits: Tensor) -> Tensor:
    return logits[:, -1, 0]


def second(logits: Tensor) -> Tensor:
    return logits[:, 0, 1] ** 2


def test_the_three_ways_to_reduce_agree() -> None:
    model = case("bare", torch.float64)
    scalar = run_sweep(model, lambda logits: first(logits).mean(), "scalar")
    average, kept = run_sweep(model, first, "mean"), run_sweep(model, first, "none")
    assert scalar.values.shape == average.values.shape == (2, LENGTH) and kept.values.shape == (2, LENGTH, 3)
    assert scalar.baseline.shape == average.baseline.shape == () and kept.baseline.shape == (3,)
    assert (scalar.reduced, average.reduced, kept.reduced) == (True, True, False)
    for one in (average, kept):
        torch.testing.assert_close(one.mean(), scalar.values, **EXACT)
        torch.testing.assert_close(one.baseline.mean(), scalar.baseline, **EXACT)


@pytest.mark.parametrize("reduce", ["scalar", "mean", "none"])
def test_several_metrics_are_what_each_alone_is(reduce: str) -> None:
    model = case("bare", torch.float64)
    alone: dict[str, Callable[[Tensor], Tensor]] = {"first": first, "second": second}
    if reduce == "scalar":
        alone = {"first": lambda logits: first(logits).sum(), "second": lambda logits: second(logits).sum()}
    together = run_sweep(model, alone, reduce)
    assert together.has_metric_axis and together.metric_names == ["first", "second"]
    for name, metric in alone.items():
        one, single = together[name], run_sweep(model, metric, reduce)
        torch.testing.assert_close(one.values, single.values, **EXACT)
        torch.testing.assert_close(one.baseline, single.baseline, **EXACT)
        torch.testing.assert_close(one.effect(), single.effect(), **EXACT)
        assert isinstance(one, LoopPatchingResult)
        assert (one.site, one.made_by, one.axis_names) == (together.site, together.made_by, single.axis_names)
    with pytest.raises(KeyError, match="unknown metric 'third'"):
        together["third"]


def test_a_metric_may_count() -> None:
    model = case("ouro", torch.float64)

    def hits(logits: Tensor) -> Tensor:
        return logits[:, -1].argmax(-1) % 2 == 0

    def ranks(logits: Tensor) -> Tensor:
        return (logits > logits[..., :1]).sum(-1)[:, -1]

    share, kept = run_sweep(model, hits, "mean"), run_sweep(model, {"hits": hits, "ranks": ranks}, "none")
    torch.testing.assert_close(kept["hits"].values.mean(-1), share.values, **EXACT)
    assert set(kept["hits"].values.unique().tolist()) <= {0.0, 1.0}
    assert kept["ranks"].effect().abs().max() >= 1
    number = run_sweep(model, lambda logits: 3.0, "scalar")
    assert number.values.unique().tolist() == [3.0]


def test_the_statistics_of_the_result_work() -> None:
    model = case("bare", torch.float64)
    clean, _ = prompts(model, batch=3, pos=LENGTH)
    result = run_sweep(model, first, "none")
    with torch.no_grad():
        clean_baseline = first(model(clean))
        corrupted_baseline = first(model(prompts(model, batch=3, pos=LENGTH)[1]))
    torch.testing.assert_close(result.baseline, corrupted_baseline, **EXACT)
    normalized = result.normalized(clean_baseline)
    torch.testing.assert_close(
        normalized[0, CHANGED], torch.ones(3, dtype=torch.float64), **EXACT
    )  # "bare": the embedding
    nothing = torch.zeros(3, dtype=torch.float64)  # happens before the prompts differ
    torch.testing.assert_close(normalized[0, 0], nothing, **EXACT)
    torch.testing.assert_close(result.stderr(), result.values.std(-1) / 3**0.5, **EXACT)
    low, high = result.bootstrap_ci(n_resamples=50, of_effect=True)
    assert bool((low <= high).all()) and low.shape == (2, LENGTH)
    p = result.permutation_pvalue()
    assert p.shape == (2, LENGTH) and bool(((p > 0) & (p <= 1)).all())
    still = replace(result, values=result.baseline.expand_as(result.values))
    assert bool((still.permutation_pvalue() == 1).all())
    reduced = run_sweep(model, first, "mean")
    with pytest.raises(ValueError, match="stderr needs per-example values; run the sweep with reduce='none'"):
        reduced.stderr()
    torch.testing.assert_close(
        reduced.normalized(clean_baseline.mean())[0, CHANGED], torch.ones((), dtype=torch.float64), **EXACT
    )


@pytest.mark.parametrize("reduce", ["mean", "none"])
def test_rows_of_the_index_match_the_values(reduce: str) -> None:
    model = case("bare", torch.float64)
    result = run_sweep(model, {"first": first, "second": second}, reduce, ("pos", "loop", "layer"))
    assert result.index_df.equals(make_df_from_ranges([LENGTH, 2, 2], ["pos", "loop", "layer"]))
    frame = result.to_dataframe()
    assert len(frame) == 2 * LENGTH * 4 * (1 if reduce == "mean" else 3)
    for row in frame.sample(12, random_state=0).to_dict("records"):
        at = (result.metric_names.index(row["metric"]), row["pos"], row["loop"], row["layer"])
        value = result.values[at] if reduce == "mean" else result.values[at][row["example"]]
        assert row["value"] == value.item()


def test_a_sweep_over_loops_alone_has_an_index_too() -> None:
    result = run_sweep(case("bare"), first, "none", ("loop",))
    assert isinstance(result, PatchingResult)
    pd.testing.assert_frame_equal(result.index_df, pd.DataFrame({"loop": [0, 1]}))


def test_the_result_says_what_made_it(capfd: pytest.CaptureFixture[str]) -> None:
    model = make(tokenizer=word_tokenizer())
    _, cache = model.run_with_cache("a b c d")
    options = {"site": "state", "axes": ("source_loop", "loop"), "when": "from"}
    result = patch_sweep(model, "a b e d", source=cache, metric=lambda logits: logits.sum(), **options, progress=False)
    assert result.str_tokens == ["a", "b", "e", "d"] and result.site == "state"
    made = {"model": "custom", "n_loops": 2, "start_at_loop": 0, "stop_at_loop": 2, "initial_state": "model"}
    assert {key: result.made_by[key] for key in made} == made
    assert result.made_by["source"] == "cache" and result.made_by["when"] == "from"
    assert capfd.readouterr().err == ""  # no bar
    patch_sweep(model, "a b e d", source=cache, metric=lambda logits: logits.sum(), **options)
    assert "Patching hook_state_pre: 100%" in capfd.readouterr().err
    assert run_sweep(case("bare"), first, "mean").str_tokens is None


def test_nothing_is_left_behind_and_gradients_are_off() -> None:
    model = make()
    clean, corrupted = prompts(model, pos=LENGTH)
    weights = {name: weight.clone() for name, weight in model.named_parameters()}
    cache = run_clean(model, clean)
    kept = {name: tensor.clone() for name, tensor in cache.items()}
    tokens = corrupted.clone()
    result = patch_sweep(
        model, corrupted, source=cache, metric=everywhere(model), site="resid_pre", reduce="none", progress=False
    )
    assert not result.values.requires_grad and not result.baseline.requires_grad
    assert torch.equal(corrupted, tokens)
    assert all(torch.equal(tensor, kept[name]) for name, tensor in cache.items())
    assert all(torch.equal(weight, weights[name]) for name, weight in model.named_parameters())
    state = noise_like(torch.empty(2, LENGTH, model.cfg.d_model))
    before = state.clone()
    given = run_clean(model, clean, initial_state=state)
    patch_sweep(
        model,
        corrupted,
        source=given,
        metric=everywhere(model),
        site="state",
        axes=("loop",),
        initial_state=state,
        reduce="none",
    )
    assert torch.equal(state, before)


def test_results_are_kept_in_files(tmp_path: Path) -> None:
    model = case("bare", torch.float64)
    _, corrupted = prompts(model, pos=LENGTH)
    where = {"sender": Sender(0, 0, "mlp"), "receivers": [Receiver("q", 1, 1, 0), Receiver("readout")]}
    results = [
        run_sweep(model, {"first": first, "second": second}, "none"),
        run_sweep(model, first, "mean", ("loop",)),
        attribution_sweep(model, corrupted, source=zero(), metric=first, reduce="none", progress=False),
        path_patch(model, corrupted, source=zero(), metric=first, reduce="none", **where),
    ]
    for result in results:
        loaded = LoopPatchingResult.load(result.save(tmp_path / "result"))
        for name, value in vars(result).items():
            same = getattr(loaded, name)
            if isinstance(value, torch.Tensor):
                assert torch.equal(same, value)
            elif name == "index_df":
                pd.testing.assert_frame_equal(same, value)
            else:
                assert same == value, name
        torch.testing.assert_close(loaded.effect(), result.effect())
        pd.testing.assert_frame_equal(loaded.to_dataframe(), result.to_dataframe())
    assert [trace.type for trace in results[-1].plot().data] == ["heatmap"]
    assert results[-1].index_df["receiver"].tolist() == ["q, loop 1, layer 1, head 0", "readout"]
    assert results[-1].to_dataframe()["receiver"].iloc[-1] == "readout"


def test_prompts_in_any_form_are_read_once() -> None:
    model = make(tokenizer=word_tokenizer())
    texts = ["a b c d", "e f g"]
    ids = [model.to_tokens(text)[0].tolist() for text in texts]
    where = {"sender": Sender(0, 0, "mlp"), "receivers": [Receiver("readout")]}
    calls = [
        lambda given: patch_sweep(model, given, source=zero(), metric=first, axes=("loop",), reduce="none"),
        lambda given: attribution_sweep(model, given, source=zero(), metric=first, axes=("loop",), reduce="none"),
        lambda given: path_patch(model, given, source=zero(), metric=first, reduce="none", **where),
    ]
    for call in calls:
        expected = call(texts).values
        assert expected.shape[-1] == 2
        for form in (iter(texts), ids, model.tokenizer(texts, padding=True, return_tensors="pt"), model.prepare(texts)):
            torch.testing.assert_close(call(form).values, expected)
    same = ["a b c", "d e f"]
    for form in (iter(same), model.to_tokens(same), model.prepare(same)):
        source = mean_source(model, form, names_filter="blocks.0.hook_resid_pre")
        assert source.run.tokens.shape == (2, 3)


def test_a_run_of_some_loops_and_unknown_options_are_refused() -> None:
    model = make(tokenizer=word_tokenizer())
    with pytest.raises(InputError, match="patching runs all loops: prepare the prompts without start_at_loop"):
        patch_sweep(model, model.prepare("a b", stop_at_loop=1), source=zero(), metric=first)
    with pytest.raises(InputError, match="patch_sweep has no argument 'sed'"):
        patch_sweep(model, "a b", source=zero(), metric=first, sed=1)
    with pytest.raises(InputError, match="pass seed to model.prepare"):
        attribution_sweep(model, model.prepare("a b"), source=zero(), metric=first, seed=1)
