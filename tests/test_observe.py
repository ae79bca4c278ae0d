"""Streaming collection against the full cache, prompt by prompt and call by call."""

from __future__ import annotations

import importlib
import math
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from helpers import TINY, fired, hook_count, make, noise_like, tiny, word_tokenizer
from test_unrolled import bridge, looped
from torch import Tensor

from tl_looped import LoopedModel
from tl_looped.observe import Measure, observe
from tl_looped.observe.observed import Observed

PROMPTS = [[3, 1, 4], [1, 5, 9, 2, 6], [7, 7, 8], [2], [2, 7, 1, 8]]
LOOPS = 3


def norm(x: Tensor) -> Tensor:
    return x.norm(dim=-1)


def distance(x: Tensor, other: Tensor) -> Tensor:
    return (x - other).norm(dim=-1)


def spread(x: Tensor) -> Tensor:
    return x.flatten(1).std(1, correction=0)


def first_key(pattern: Tensor) -> Tensor:
    return pattern[..., 0]


def frobenius(pattern: Tensor, other: Tensor) -> Tensor:
    return (pattern - other).flatten(2).norm(dim=-1)


def trace(pattern: Tensor) -> Tensor:
    return pattern.diagonal(dim1=-2, dim2=-1).sum(-1)


RESID, PATTERN = "hook_resid_post", "attn.hook_pattern"
MEASURES = [
    Measure("norm", "‖x‖", "L2", RESID, norm, axes=("pos",)),
    Measure("spread", "spread", "L2", "hook_mlp_out", spread),
    Measure("step", "step", "L2", RESID, distance, "previous", ("pos",)),
    Measure("to_last", "distance", "L2", RESID, distance, "last", ("pos",)),
    Measure("sink", "sink", "", PATTERN, first_key, axes=("head", "pos")),
    Measure("trace", "trace", "", PATTERN, trace, axes=("head",)),
    Measure("turn", "pattern step", "Frobenius", PATTERN, frobenius, "previous", ("head",)),
    Measure("turn_to_last", "pattern distance", "Frobenius", PATTERN, frobenius, "last", ("head",)),
]


def run(model: Any, measures: Sequence[Measure] = MEASURES, n_loops: int | None = LOOPS, **options: Any) -> Observed:
    return observe(model, options.pop("prompts", PROMPTS), n_loops, measures=measures, progress=False, **options)


def slowly(
    model: LoopedModel, measures: Sequence[Measure], prompts: list[list[int]], **options: Any
) -> dict[str, list[Any]]:
    """What each measure gives at every layer call, from the full cache of prompts of one length: None if undefined."""
    _, cache = model.run_with_cache(torch.tensor(prompts), LOOPS, **options)
    found: dict[str, list[Any]] = {measure.name: [] for measure in measures}
    for measure in measures:
        for stack, layer, loop in model.cfg.schedule(LOOPS).layer_calls():
            name = f"{stack}.{layer}.{'' if loop is None else f'loop.{loop}.'}{measure.site}"
            others: tuple[Tensor, ...] = ()
            if measure.compare != "none":
                other = -1 if loop is None else loop - 1 if measure.compare == "previous" else LOOPS - 1
                if other < 0:
                    found[measure.name].append(None)
                    continue
                others = (cache[f"{stack}.{layer}.loop.{other}.{measure.site}"],)
            found[measure.name].append(measure.function(cache[name], *others))
    return found


def over_positions(measure: Measure, value: Tensor) -> Tensor:
    if "pos" not in measure.axes:
        return value
    one = value.movedim(1 + measure.axes.index("pos"), -1)
    return sum(one[..., j] for j in range(one.shape[-1])) / one.shape[-1]


def assert_near(here: Tensor, wanted: Tensor | None, limit: float) -> None:
    """Equal up to `limit` of the largest number; or undefined."""
    if wanted is None:
        assert bool(here.isnan().all())
    else:
        assert here.dtype == wanted.dtype and here.shape == wanted.shape
        assert float((here - wanted).abs().max()) <= limit * max(1.0, float(wanted.abs().max()))


# Equal to the full cache.


@pytest.mark.parametrize("family", TINY)
@pytest.mark.parametrize(
    ("dtype", "limit", "together"),
    [(torch.float64, 1e-12, False), (torch.float32, 1e-6, True)],
    ids=["double", "float"],
)
def test_streaming_equals_the_full_cache(family: str, dtype: torch.dtype, limit: float, together: bool) -> None:
    model = tiny(family, dtype)
    result = run(model, per_token=["step", "sink"])
    assert list(result.values) == [measure.name for measure in MEASURES] and bool(result.done.all())
    groups = [[i] for i in range(len(PROMPTS))]
    if together:  # the same rounding as in the batches of observe
        groups = [[i for i, prompt in enumerate(PROMPTS) if len(prompt) == n] for n in (1, 3, 4, 5)]
    for rows in groups:
        wanted = slowly(model, MEASURES, [PROMPTS[i] for i in rows])
        for measure in MEASURES:
            for depth, value in enumerate(wanted[measure.name]):
                mean = None if value is None else over_positions(measure, value)
                assert_near(result[measure.name][rows, depth], mean, limit)
                if measure.name in result.per_token:
                    for i, row in enumerate(rows):
                        tokens = result.per_token[measure.name][row]
                        assert tokens is not None and tokens.shape[-1] == len(PROMPTS[row])
                        one = None if value is None else value[i]
                        assert_near(tokens[depth], one, limit)  # the position is last here in both measures


def test_order_and_batches_change_nothing() -> None:
    model = tiny("huginn", torch.float64)
    base = run(model, per_token=["norm"])
    for batch_size in (1, 2, 3):
        other = run(model, per_token=["norm"], batch_size=batch_size, prompts=PROMPTS[::-1])
        assert other.tokens[0].tolist() == PROMPTS[-1]
        for measure in MEASURES:
            torch.testing.assert_close(
                base[measure.name], other[measure.name].flip(0), atol=1e-12, rtol=0, equal_nan=True
            )
        for one, same in zip(base.per_token["norm"], other.per_token["norm"][::-1], strict=True):
            torch.testing.assert_close(one, same, atol=1e-12, rtol=0)


def test_a_token_like_the_paddings_is_a_token() -> None:
    model = make(tokenizer=word_tokenizer(pad_token="a"), **TINY["ouro"])  # id 2
    rows = torch.tensor([[2, 3, 4], [5, 3, 2]])
    both = run(model, prompts=rows, attention_mask=torch.ones_like(rows))
    alone = run(model, prompts=rows[:1], attention_mask=torch.ones(1, 3))
    torch.testing.assert_close(both["norm"][:1], alone["norm"], atol=1e-5, rtol=0)
    _, cache = model.run_with_cache(torch.tensor([[2, 3, 4]]), LOOPS, attention_mask=torch.ones(1, 3))
    torch.testing.assert_close(alone["norm"][0, -1], norm(cache["resid_post", 1, LOOPS - 1][0]).mean())


def test_padding_of_a_tensor_is_cut_off() -> None:
    model = make(tokenizer=word_tokenizer(), **TINY["llama"])
    padded = torch.tensor([[0, 0, 3, 4, 5], [6, 7, 8, 9, 10]])
    result, alone = run(model, prompts=padded), run(model, prompts=[[3, 4, 5], [6, 7, 8, 9, 10]])
    assert [len(row) for row in result.tokens] == [3, 5]
    for measure in MEASURES:
        torch.testing.assert_close(result[measure.name], alone[measure.name], rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("shape", ["one", "each"])
def test_a_given_state_is_where_every_prompt_starts(shape: str) -> None:
    model = tiny("llama", torch.float64)
    state = noise_like(torch.zeros(len(PROMPTS), 5, model.cfg.d_model, dtype=torch.float64))
    given = state[0] if shape == "one" else state
    result = run(model, MEASURES[:1], initial_state=given)
    for i, prompt in enumerate(PROMPTS):
        mine = state[0 if shape == "one" else i, : len(prompt)][None]
        wanted = slowly(model, MEASURES[:1], [prompt], initial_state=mine)["norm"]
        torch.testing.assert_close(result["norm"][i], torch.stack([value.mean() for value in wanted]))
    assert str(result.made_by["initial_state"]).startswith("given, ")


def test_the_seed_is_that_of_the_model() -> None:
    model = tiny("huginn", torch.float64)
    result = run(model, MEASURES[:1], seed=5)
    wanted = slowly(model, MEASURES[:1], PROMPTS[1:2], seed=5)["norm"]
    torch.testing.assert_close(result["norm"][1], torch.stack([value.mean() for value in wanted]))
    assert result.made_by["initial_state"] == "seed 5" and run(model, MEASURES[:1]).made_by["initial_state"] == "seed 0"
    assert not torch.allclose(result["norm"], run(model, MEASURES[:1])["norm"])


def test_hooks_on_the_model_act() -> None:
    model = tiny("added", torch.float64)
    measure = Measure("written", "‖MLP‖", "L2", "hook_mlp_out", norm, axes=("pos",))
    with model.hooks([("blocks.1.loop.2.hook_mlp_out", lambda x, hook: torch.zeros_like(x))]):
        ablated = run(model, [measure])
    whole, depth = run(model, [measure]), model.cfg.schedule(LOOPS).realised_depth("blocks", 1, 2)
    assert float(ablated["written"][:, depth].abs().max()) == 0 and hook_count(model) == 0
    torch.testing.assert_close(ablated["written"][:, :depth], whole["written"][:, :depth], rtol=0, atol=0)
    assert bool((ablated["written"][:, depth + 1 :] != whole["written"][:, depth + 1 :]).all())
    assert ablated.made_by["hooks"] != whole.made_by["hooks"] == []


@pytest.mark.parametrize("at_once", [1, 200, 1000])
@pytest.mark.parametrize("family", ["huginn", "ouro"])
def test_how_many_calls_are_measured_together_changes_nothing(
    family: str, at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny(family, torch.float64)
    together = run(model, per_token=["step"])
    monkeypatch.setattr(importlib.import_module("tl_looped.observe.batch"), "_AT_ONCE", at_once)
    apart = run(model, per_token=["step"])
    for measure in MEASURES:
        torch.testing.assert_close(together[measure.name], apart[measure.name], atol=1e-13, rtol=0, equal_nan=True)
    for one, same in zip(together.per_token["step"], apart.per_token["step"], strict=True):
        torch.testing.assert_close(one, same, atol=1e-13, rtol=0, equal_nan=True)


# What is kept, and how often the model runs.


@pytest.fixture
def one_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """A measure's function is called once for every layer call."""
    monkeypatch.setattr(importlib.import_module("tl_looped.observe.batch"), "_AT_ONCE", 1)


@pytest.mark.usefixtures("one_at_a_time")
@pytest.mark.parametrize("compare", ["none", "previous", "last"])
def test_the_activations_kept_do_not_grow_with_the_loops(compare: Any) -> None:
    def most_alive(n_loops: int) -> int:
        seen: list[weakref.ref[Tensor]] = []
        most = 0

        def look(x: Tensor, *others: Tensor) -> Tensor:
            nonlocal most
            seen.append(weakref.ref(x))
            most = max(most, sum(ref() is not None for ref in seen))
            return x.flatten(1).sum(1)

        run(tiny("llama"), [Measure("one", "", "", PATTERN, look, compare)], n_loops, prompts=[[1, 2, 3]])
        return most

    assert most_alive(12) == most_alive(4) <= 4  # two core layers, and what is just being computed


def test_comparing_with_the_end_takes_two_runs_and_all_else_one() -> None:
    def runs(measures: Sequence[Measure]) -> tuple[int, int]:
        model, calls = make(**TINY["huginn"]), [0, 0]
        with model.hooks([("hook_embed", lambda x, hook: calls.__setitem__(0, calls[0] + 1))]):
            run(model, measures, batch_size=2)
        with model.hooks([("coda.0.hook_resid_pre", lambda x, hook: calls.__setitem__(1, calls[1] + 1))]):
            run(model, measures, batch_size=2)
        return calls[0], calls[1]

    batches = 4  # of 1, 3, 4 and 5 tokens
    assert runs(MEASURES[:3]) == (batches, batches)
    assert runs(MEASURES[3:4]) == (2 * batches, batches)  # the first run ends with the loops


@pytest.mark.usefixtures("one_at_a_time")
def test_a_component_is_hooked_once_and_others_not_at_all() -> None:
    model, counts = make(**TINY["llama"]), []
    measure = Measure("count", "", "", RESID, lambda x: counts.append(hook_count(model)) or norm(x), axes=("pos",))
    run(model, [measure, MEASURES[0]], prompts=[[1, 2]])
    assert set(counts) == {4} and hook_count(model) == 0  # prelude, two core layers, coda
    assert len(counts) == 2 + 2 * LOOPS
    assert not any("unembed" in name for name in fired(model, torch.tensor([[1, 2]])))


# NaN and statistics.


def undefined_first(x: Tensor) -> Tensor:
    values = norm(x)
    values[:, 0] = math.nan
    return values


def test_undefined_positions_are_left_out() -> None:
    model = tiny("ouro", torch.float64)
    result = run(
        model, [Measure("later", "", "L2", RESID, undefined_first, axes=("pos",)), MEASURES[0]], per_token=["norm"]
    )
    for i, prompt in enumerate(PROMPTS):
        tokens = result.per_token["norm"][i]
        assert tokens is not None
        if len(prompt) == 1:
            assert bool(result["later"][i].isnan().all())
        else:
            torch.testing.assert_close(result["later"][i], tokens[:, 1:].mean(-1))
    mean = result.mean("later")
    kept = [i for i, prompt in enumerate(PROMPTS) if len(prompt) > 1]
    torch.testing.assert_close(mean, result["later"][kept].mean(0))


def table(values: list[list[float]]) -> Observed:
    """A result with one measure of these values, [prompt, depth]."""
    model = tiny("ouro")
    result = run(model, MEASURES[:1], 2, prompts=[[1]] * len(values))
    return Observed(**{**vars(result), "values": {"norm": torch.tensor(values, dtype=torch.float64)}})


def test_statistics_are_over_the_prompts_that_have_a_number() -> None:
    nan = math.nan
    result = table([[1.0, nan, nan, 0.0], [2.0, 5.0, nan, 0.0], [6.0, 7.0, nan, 0.0]])
    assert result.mean("norm").tolist()[:2] == [3.0, 6.0] and bool(result.mean("norm")[2].isnan())
    assert result.var("norm").tolist()[:2] == [7.0, 2.0] and bool(result.var("norm")[2].isnan())
    assert result.quantile("norm", 0.5).tolist()[:2] == [2.0, 6.0] and bool(result.quantile("norm", 0.5)[2].isnan())
    assert result.quantile("norm", 0.25)[0] == 1.5 and result.quantile("norm", 1.0)[0] == 6.0
    assert result.by_loop("norm").shape == (2, 2) and result.by_loop("norm")[0].tolist() == [3.0, 6.0]
    assert bool(table([[1.0, 2.0, 3.0, 4.0]]).var("norm").isnan().all())  # of one prompt there is no variance


def test_by_loop_is_the_core_alone() -> None:
    result = run(tiny("huginn"))
    schedule = result.schedule
    for t in range(LOOPS):
        for layer in range(2):
            depth = schedule.realised_depth("blocks", layer, t)
            assert result.by_loop("sink")[t, layer].tolist() == result.mean("sink")[depth].tolist()
    assert bool(result.by_loop("step")[0].isnan().all()) and not bool(result.by_loop("step")[1:].isnan().any())
    assert float(result.by_loop("to_last")[-1].abs().max()) == 0


def test_the_table_has_every_number() -> None:
    result = run(tiny("huginn"), [MEASURES[0], MEASURES[4]])
    frame, depth = result.to_dataframe(), result.schedule.depth
    assert list(frame.columns) == ["measure", "prompt", "depth", "stack", "layer", "loop", "value", "head"]
    assert len(frame) == len(PROMPTS) * depth * (1 + 4)
    row = frame.query("measure == 'sink' and prompt == 4 and layer == 1 and loop == 2")
    assert row["value"].tolist() == result["sink"][4, result.schedule.realised_depth("blocks", 1, 2)].double().tolist()
    assert row["head"].tolist() == [0, 1, 2, 3]
    coda = frame[frame["stack"] == "coda"]
    assert bool(coda["loop"].isna().all()) and set(coda["depth"]) == {depth - 1}
    assert list(result.to_dataframe("norm").columns) == [
        "measure",
        "prompt",
        "depth",
        "stack",
        "layer",
        "loop",
        "value",
    ]


@pytest.mark.parametrize("group", ["depth", "loop", "layer"])
def test_plots(group: Any) -> None:
    result = run(tiny("huginn"))
    figure = result.plot("sink", group)
    drawn = [trace for trace in figure.data if trace.mode == "lines+markers"]
    assert len(drawn) == {"depth": 1, "loop": LOOPS + 2, "layer": 2}[group]
    if group == "layer":
        expected = result.by_loop("sink").mean(-1)[:, 1]
        torch.testing.assert_close(torch.tensor(drawn[1].y), expected, rtol=1e-4, atol=0)
    assert "5 prompts" in figure.layout.title.text and "heads" in figure.layout.title.text
    assert "quartiles over prompts" in str(drawn[0].customdata[0])
    one = run(tiny("huginn"), prompts=[[1, 2]]).plot("to_last", "loop", log=True)
    assert one.layout.yaxis.type == "log" and "one prompt" in one.layout.title.text


def test_a_result_is_kept_in_a_file(tmp_path: Any) -> None:
    result = run(tiny("ouro"), per_token=["sink"])
    again = Observed.load(result.save(tmp_path / "kept"))
    assert again.made_by == result.made_by and again.schedule == result.schedule and again.axes == result.axes
    for measure in MEASURES:
        torch.testing.assert_close(again[measure.name], result[measure.name], rtol=0, atol=0, equal_nan=True)
    for one, same in zip(again.per_token["sink"], result.per_token["sink"], strict=True):
        torch.testing.assert_close(one, same, rtol=0, atol=0)


# Feedforward models.

PLAIN = [measure for measure in MEASURES if measure.compare == "none"]


@pytest.mark.parametrize("make_model", [lambda: looped().unrolled(), bridge, lambda: bridge(True)])
def test_feedforward_models_have_the_same_measures(make_model: Callable[[], Any]) -> None:
    result, wanted = run(make_model(), PLAIN, None), run(looped(), PLAIN, 2)
    assert result.schedule.describe() == "blocks 6" and result.schedule.n_loops() == 0
    for measure in PLAIN:
        torch.testing.assert_close(result[measure.name], wanted[measure.name], rtol=1e-5, atol=1e-5)
    assert len(result.plot("sink").data) >= 1
