"""Attention stability: each distance against a closed form and against loops over single numbers."""

import itertools
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import TINY, make, tiny, tokens_for
from torch import Tensor

from tl_looped import LoopedModel
from tl_looped.attention import (
    PATTERN_DISTANCE,
    PATTERN_STEP,
    STABILITY,
    TOTAL_VARIATION,
    AttentionStability,
    PatternDistances,
    attention_stability,
    pattern_distances_of,
    stability_of,
)
from tl_looped.attention.patterns import (
    at_query,
    checked_pattern,
    distance_matrix,
    mean_total_variation,
    pattern_distance,
    settling_loop,
    total_variation,
)
from tl_looped.engine.errors import InputError
from tl_looped.observe import observe

NAN = float("nan")


def uniform(size: int) -> Tensor:
    return torch.full((size, size), 1 / size, dtype=torch.float64)


def one_hot(size: int, key: int) -> Tensor:
    pattern = torch.zeros(size, size, dtype=torch.float64)
    pattern[:, key] = 1
    return pattern


def patterns(*shape: int, seed: int = 0) -> Tensor:
    """Random causal patterns, float64."""
    scores = 3 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    hidden = torch.ones(shape[-2:], dtype=torch.bool).triu(1)
    return scores.masked_fill(hidden, -math.inf).softmax(-1)


def slow_frobenius(a: Tensor, b: Tensor) -> float:
    return math.sqrt(sum((float(a[i, j]) - float(b[i, j])) ** 2 for i in range(len(a)) for j in range(len(a[0]))))


def slow_variation(a: Tensor, b: Tensor, row: int) -> float:
    return sum(abs(float(a[row, j]) - float(b[row, j])) for j in range(a.shape[1])) / 2


def test_distances_of_one_hot_and_uniform_patterns():
    a, b, spread = one_hot(4, 0), one_hot(4, 2), uniform(4)
    assert float(pattern_distance(a, b)) == pytest.approx(math.sqrt(2 * 4))
    assert float(pattern_distance(a, b, "normalised")) == pytest.approx(1)
    assert float(pattern_distance(a, spread)) == pytest.approx(math.sqrt(4 * (1 - 1 / 4)))
    assert float(pattern_distance(a, spread, "relative")) == pytest.approx(math.sqrt(3) / 1)
    assert float(pattern_distance(a, a)) == 0
    assert total_variation(a, b).tolist() == [1, 1, 1, 1]
    assert total_variation(a, spread).tolist() == [0.75] * 4
    assert float(mean_total_variation(a, a)) == 0


def test_distances_against_loops_over_single_numbers():
    a, b = patterns(2, 3, 5, 5), patterns(2, 3, 5, 5, seed=1)
    distance, variation = pattern_distance(a, b), total_variation(a, b)
    assert distance.shape == (2, 3) and variation.shape == (2, 3, 5)
    for i in range(2):
        for j in range(3):
            assert float(distance[i, j]) == pytest.approx(slow_frobenius(a[i, j], b[i, j]), abs=1e-12)
            for row in range(5):
                assert float(variation[i, j, row]) == pytest.approx(slow_variation(a[i, j], b[i, j], row), abs=1e-12)
    torch.testing.assert_close(mean_total_variation(a, b), variation.mean(-1))
    torch.testing.assert_close(pattern_distance(a, b, "relative") * torch.linalg.matrix_norm(b), distance)


def test_some_queries_are_normalised_by_their_number():
    a, b = (torch.eye(5)[keys] for keys in ([0, 1], [2, 3]))  # 2 queries, 5 keys, and no key in common
    assert pattern_distance(a, b, "normalised").item() == pytest.approx(1.0)
    assert pattern_distance(a[:1], b[:1], "normalised").item() == pytest.approx(1.0)


@pytest.mark.parametrize("function", [pattern_distance, mean_total_variation])
@pytest.mark.parametrize("batch", [(2,), (2, 3), (2, 3, 4)])
def test_axes_in_front_are_patterns_of_their_own(function: Any, batch: tuple[int, ...]):
    a, b = patterns(*batch, 5, 6), patterns(*batch, 5, 6, seed=1)
    found = function(a, b)
    assert found.shape == batch
    for place in itertools.product(*map(range, batch)):
        assert found[place].item() == pytest.approx(function(a[place], b[place]).item())


def test_a_single_key_is_no_number():
    single = torch.ones(3, 1, 1)
    for function in (pattern_distance, mean_total_variation, total_variation):
        assert bool(function(single, single).isnan().all())
    assert bool(distance_matrix(single).isnan().all())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_measured_in_float32(dtype: torch.dtype):
    a, b = patterns(2, 6, 6).to(dtype), patterns(2, 6, 6, seed=1).to(dtype)
    found = pattern_distance(a, b)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, torch.linalg.matrix_norm(a.float() - b.float()))


def test_distance_matrix_is_every_pair_by_hand():
    calls = patterns(4, 2, 5, 5)
    matrix = distance_matrix(calls)
    assert matrix.shape == (2, 4, 4)
    for head in range(2):
        for i in range(4):
            for j in range(4):
                expected = slow_frobenius(calls[i, head], calls[j, head])
                assert float(matrix[head, i, j]) == pytest.approx(expected, abs=1e-12)
    assert bool((matrix.diagonal(dim1=-2, dim2=-1) == 0).all())


def test_nearly_equal_patterns_do_not_cancel():
    a = patterns(5, 5).float()
    b = a.clone()
    b[4, 0], b[4, 1] = b[4, 0] + 2e-7, b[4, 1] - 2e-7
    expected = float(torch.linalg.matrix_norm((a - b).double()))
    assert float(distance_matrix(torch.stack([a, b]))[0, 1]) == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize(
    ("distances", "expected"),
    [
        ([0.5, 0.2, 0.05, 0.01, 0.0], 2),
        ([0.01, 0.2, 0.05, 0.01, 0.0], 2),  # near at first, but it leaves again
        ([0.0, 0.0, 0.0], 0),
        ([0.5, 0.4, 0.3, 0.0], NAN),  # only the last loop is near the last loop
        ([0.5, 0.01, 0.5, 0.0], NAN),
        ([0.1, 0.1, 0.0], 0),  # at the tolerance counts
        ([0.01, NAN, 0.01, 0.0], 2),
        ([0.01, NAN, 0.0], NAN),
    ],
)
def test_settling_loop(distances: list[float], expected: float):
    found = settling_loop(torch.tensor(distances, dtype=torch.float64), 0.1)
    assert float(found) == pytest.approx(expected, nan_ok=True)


def test_settling_loop_of_constructed_heads():
    loops = 12
    orbit = torch.stack([one_hot(3, t % 2) for t in range(loops)])
    arrives = torch.stack([one_hot(3, 0 if t < 5 else 1) for t in range(loops)])
    drift = torch.stack([(1 - t / loops) * one_hot(3, 0) + t / loops * one_hot(3, 1) for t in range(loops)])
    heads = torch.stack([orbit, arrives, drift], dim=1)
    to_last = mean_total_variation(heads, heads[-1:].expand_as(heads))
    found = settling_loop(to_last, 0.09)
    assert found.tolist() == pytest.approx([NAN, 5, 10], nan_ok=True)
    assert bool(settling_loop(to_last, 0.05)[2].isnan())  # small steps of 1/12, but they never end


def slow_stability(model: LoopedModel, prompt: Tensor, n_loops: int) -> dict[tuple[int, int, int], dict[str, float]]:
    """Every change of every head, from a full cache and loops over single numbers."""
    _, cache = model.run_with_cache(prompt, n_loops)
    pos, found = prompt.shape[1], {}
    for layer in range(model.cfg.n_core):
        for head in range(model.cfg.n_heads):
            at = [cache["pattern", layer, t][0, head].double() for t in range(n_loops)]
            for t in range(n_loops):
                others = {"to_previous": at[t - 1] if t else None, "to_last": at[-1]}
                for name, other in others.items():
                    tv = [NAN] if other is None else [slow_variation(at[t], other, row) for row in range(pos)]
                    far = NAN if other is None else slow_frobenius(at[t], other)
                    cell = found.setdefault((t, layer, head), {})
                    cell[f"tv_{name}"], cell[f"frobenius_{name}"] = sum(tv) / len(tv), far
    return found


@pytest.mark.parametrize("family", TINY)
def test_attention_stability_is_what_a_full_cache_gives(family: str):
    model = tiny(family, torch.float64)
    prompt = tokens_for(model, batch=1)
    result = attention_stability(model, prompt, 4, tolerance=0.02)
    slow = slow_stability(model, prompt, 4)
    for place, changes in slow.items():
        for name, value in changes.items():
            assert float(getattr(result, name)[place]) == pytest.approx(value, abs=1e-12, nan_ok=True), (place, name)
    for layer in range(2):
        for head in range(4):
            steps = [slow[t, layer, head]["tv_to_previous"] for t in range(1, 4)]
            assert float(result.score[layer, head]) == pytest.approx(1 - sum(steps) / 3)
            far = [slow[t, layer, head]["tv_to_last"] > 0.02 for t in range(3)]
            settles = NAN if far[-1] else max([t + 1 for t in range(3) if far[t]], default=0)
            assert float(result.settles_at[layer, head]) == pytest.approx(settles, nan_ok=True)


def test_one_query_alone():
    model = tiny("llama")
    prompt = tokens_for(model, batch=1)
    every, last = attention_stability(model, prompt, 3), attention_stability(model, prompt, 3, position=-1)
    _, cache = model.run_with_cache(prompt, 3)
    moved = (cache["pattern", 1, 0][0, 2, -1] - cache["pattern", 1, 2][0, 2, -1]).abs().sum() / 2
    assert float(last.tv_to_last[0, 1, 2]) == pytest.approx(float(moved), abs=1e-6)
    assert last.position == -1 and every.position is None
    assert float(last.tv_to_last[0, 1, 2]) != pytest.approx(float(every.tv_to_last[0, 1, 2]), rel=1e-3)


def test_many_prompts_are_the_mean_of_each():
    model = tiny("llama", torch.float64)
    prompts = [[2, 5, 7], [3, 4, 9, 11, 6], [8], [8, 1, 7]]
    found = attention_stability(model, prompts, 4, tolerance=0.02, position=-1, progress=False)
    alone = [attention_stability(model, prompts[i : i + 1], 4, position=-1, progress=False) for i in (0, 1, 3)]
    for name in ("tv_to_previous", "tv_to_last", "frobenius_to_previous", "frobenius_to_last"):
        each = torch.stack([getattr(one, name) for one in alone])
        assert found.per_prompt[name][2].isnan().all()  # a single token
        torch.testing.assert_close(found.per_prompt[name][[0, 1, 3]], each, equal_nan=True)
        torch.testing.assert_close(getattr(found, name), each.mean(0), equal_nan=True)
    torch.testing.assert_close(found.score, torch.stack([one.score for one in alone]).mean(0))
    assert torch.equal(found.settles_at.nan_to_num(-1), settling_loop(found.tv_to_last, 0.02).nan_to_num(-1))
    assert "mean over 4 prompts" in str(found.plot().layout.title.text)


def test_an_observation_gives_the_same():
    model = tiny("olmo2")
    prompts = [[2, 5, 7], [3, 4, 9, 11, 6]]
    for position in (None, 1):
        measures = STABILITY if position is None else [at_query(one, position) for one in STABILITY]
        observed = observe(model, prompts, 3, measures=measures, progress=False)
        one = stability_of(observed, position=position)
        two = attention_stability(model, model.prepare(prompts, 3), position=position, progress=False)
        assert torch.equal(one.tv_to_last, two.tv_to_last) and torch.equal(one.score, two.score)
    with pytest.raises(InputError, match="leave out start_at_loop and stop_at_loop"):
        attention_stability(model, model.prepare(prompts, 3, stop_at_loop=2))


def test_attention_that_moves_all_of_itself_in_every_loop_scores_zero():
    model = tiny("llama")

    def turn(pattern: Tensor, hook: Any) -> Tensor:
        return one_hot(2, hook.loop % 2).to(pattern).expand_as(pattern)

    with model.hooks(fwd_hooks=[("blocks.1.attn.hook_pattern", turn)]):
        result = attention_stability(model, torch.tensor([[1, 2]]), 5)
    assert bool((result.score[1] == 0).all()) and bool((result.score[0] > 0).all())
    assert result.tv_to_last[:, 1, 0].tolist() == [0, 1, 0, 1, 0] and bool(result.settles_at[1].isnan().all())


def test_a_prompt_as_text_and_as_one_row_of_ids():
    model = tiny("llama")
    prompt = tokens_for(model, batch=1)
    one, other = attention_stability(model, prompt), attention_stability(model, prompt[0])
    assert torch.equal(one.score, other.score)
    assert one.tv_to_last.shape == (model.cfg.n_loops, 2, 4)


def test_stability_as_tables_and_figures(tmp_path: Path):
    model = tiny("ouro")
    result = attention_stability(model, tokens_for(model, batch=1), 4, tolerance=0.3)
    table, heads = result.to_dataframe(), result.heads()
    assert len(table) == 4 * 2 * 4 and len(heads) == 2 * 4
    row = table[(table["loop"] == 2) & (table["layer"] == 1) & (table["head"] == 3)].iloc[0]
    assert row["frobenius_to_last"] == float(result.frobenius_to_last[2, 1, 3])
    assert heads["score"].iloc[5] == float(result.score[1, 1])
    fig = result.plot("tv_to_previous")
    heat, marks = fig.data
    assert len(heat.z) == 8 and heat.z[7][0] is None
    assert heat.z[7][2] == pytest.approx(float(result.tv_to_previous[2, 1, 3]), rel=1e-4)
    settled = [x for x in marks.x if x is not None]
    assert settled == [int(t) for t in result.settles_at.flatten().tolist() if not math.isnan(t)]
    loaded = AttentionStability.load(result.save(tmp_path / "stability"))
    assert torch.equal(loaded.settles_at.nan_to_num(-1), result.settles_at.nan_to_num(-1))
    assert loaded.made_by == result.made_by and loaded.tolerance == 0.3


def test_no_head_settles_and_the_figure_says_so():
    model = tiny("ouro")
    result = attention_stability(model, tokens_for(model, batch=1), 3, tolerance=0.0)
    assert bool(result.settles_at.isnan().all())
    assert "(0 of 8 heads)" in str(result.plot().data[1].name)


def test_pattern_distances_are_those_of_every_pair(tmp_path: Path):
    model = tiny("huginn", torch.float64)
    _, cache = model.run_with_cache(tokens_for(model, batch=1), 3)
    result = pattern_distances_of(cache)
    assert result.distance.shape == (4, 6, 6) and result.loops == (0, 1, 2) and result.layers == (0, 1)
    for call in range(6):
        for other in range(6):
            one = cache["pattern", call % 2, call // 2][0, 1]
            two = cache["pattern", other % 2, other // 2][0, 1]
            assert float(result.distance[1, call, other]) == pytest.approx(slow_frobenius(one, two), abs=1e-12)
    row = result.to_dataframe().query("head == 1 and loop == 2 and layer == 0 and other_loop == 0 and other_layer == 1")
    assert row["distance"].item() == float(result.distance[1, 4, 1])
    torch.testing.assert_close(result.mean(), result.distance.mean(0))
    assert result.plot(head=-1).data[0].z[4][1] == pytest.approx(float(result.distance[3, 4, 1]), rel=1e-4)
    assert torch.equal(PatternDistances.load(result.save(tmp_path / "far")).distance, result.distance)


def test_pattern_distances_of_some_loops_and_of_a_cache_without_batch():
    model = tiny("llama")
    prompt = tokens_for(model, batch=1)
    _, cache = model.run_with_cache(prompt, 5, loops=[1, 4], names_filter="blocks.1.attn.hook_pattern")
    some = pattern_distances_of(cache)
    assert some.loops == (1, 4) and some.layers == (1,) and some.distance.shape == (4, 2, 2)
    _, flat = model.run_with_cache(prompt, 5, remove_batch_dim=True)
    assert torch.equal(pattern_distances_of(flat).distance[:, [3, 9]][:, :, [3, 9]], some.distance)


def test_measures_agree_with_the_analysis_of_one_prompt():
    model = tiny("llama")
    prompt = tokens_for(model, batch=1)
    result = attention_stability(model, prompt, 4)
    measures = [PATTERN_STEP, PATTERN_DISTANCE, TOTAL_VARIATION]
    observed = observe(model, prompt, 4, measures=measures, progress=False)
    for measure, name in zip(measures, ("frobenius_to_previous", "frobenius_to_last", "tv_to_previous"), strict=True):
        found = observed.by_loop(measure.name)
        torch.testing.assert_close(found.float(), getattr(result, name), equal_nan=True, atol=1e-6, rtol=1e-5)


def test_attention_that_does_not_depend_on_the_state_is_still():
    model = make(**TINY["added"])
    with torch.no_grad():
        for block in model.transformer.blocks:
            block.attn.q.weight.zero_()
    result = attention_stability(model, tokens_for(model, batch=1), 4)
    assert bool((result.score == 1).all()) and bool((result.settles_at == 0).all())


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        (torch.rand(3, 3) + 0.1, "row whose sum is .* away from one.*not hook_attn_scores"),
        (torch.full((2, 2), NAN), "NaN or infinity"),
        (torch.tensor([[1.5, -0.5], [0.5, 0.5]]), "negative share, -0.5"),
        (torch.ones(3), r"floats \[..., query, key\], not empty, got .*\(3,\)"),
        (torch.ones(2, 2, dtype=torch.int64), "must be floats.*int64"),
        (torch.ones(0, 2, 2), "empty"),
    ],
)
@pytest.mark.usefixtures("as_a_user")
def test_what_is_no_pattern(pattern: Tensor, message: str):
    with pytest.raises(InputError, match=message):
        checked_pattern(pattern)


@pytest.mark.parametrize(
    ("dtype", "off"), [(torch.float64, 1e-8), (torch.float32, 1e-4), (torch.float16, 1e-2), (torch.bfloat16, 5e-2)]
)
def test_rounding_passes_and_more_does_not(dtype: torch.dtype, off: float):
    pattern = patterns(4, 40, 40).to(dtype)
    assert checked_pattern(pattern).shape == pattern.shape
    with pytest.raises(InputError, match="away from one"):
        checked_pattern(pattern * (1 + off))


def run(**options: Any) -> AttentionStability:
    model = tiny("llama")
    options = {"prompts": tokens_for(model, batch=1), "n_loops": 3, **options}
    return attention_stability(model, **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n_loops": 1}, "compares loops, but this run has one: pass n_loops of at least 2"),
        ({"prompts": torch.zeros(2, 1, dtype=torch.int64)}, "single token can only look at itself"),
        ({"stop_at_loop": 2}, "attention_stability has no argument 'stop_at_loop'"),
        ({"position": 5}, "position 5 is out of range"),
        ({"position": 2, "prompts": [[1, 2, 3], [1, 2]]}, "position 2 is out of range: 2 exist"),
        ({"tolerance": -0.1}, "tolerance must be a finite number of at least 0, got -0.1"),
        ({"tolerance": NAN}, "tolerance must be a finite number"),
    ],
)
def test_what_stability_refuses_before_it_runs(options: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(LoopedModel, "execute", lambda *a, **o: pytest.fail("it ran"))
    with pytest.raises(InputError, match=message):
        run(**options)


def test_a_pattern_that_is_not_finite_is_named():
    model = make(**TINY["llama"])
    with torch.no_grad():
        model.transformer.injection.weight.fill_(1e30)
    with pytest.raises(InputError, match="not finite, from 'blocks.0.loop.0.ln1.hook_scale' .* on"):
        attention_stability(model, tokens_for(model, batch=1), 3)


def test_other_refusals():
    with pytest.raises(InputError, match="has 1 loops, but this needs at least two"):
        settling_loop(torch.zeros(1, 3), 0.1)
    model = tiny("llama")
    _, cache = model.run_with_cache(tokens_for(model), 2)
    with pytest.raises(InputError, match="holds 2 prompts.*apply_slice_to_batch_dim"):
        pattern_distances_of(cache)
    assert pattern_distances_of(cache.apply_slice_to_batch_dim(0)).distance.shape == (4, 4, 4)
    _, cache = model.run_with_cache(tokens_for(model, 1, 1), 2)
    with pytest.raises(InputError, match="single token"):
        pattern_distances_of(cache)
    _, cache = model.run_with_cache(tokens_for(model, 1), 2, names_filter="blocks.0.hook_resid_post")
    with pytest.raises(InputError, match="not cached"):
        pattern_distances_of(cache)


@pytest.mark.usefixtures("as_a_user")
def test_options_of_wrong_kinds():
    a = patterns(3, 3)
    with pytest.raises(InputError, match=r"must have the same shape, got \(3, 3\) and \(2, 2\)"):
        pattern_distance(a, a[:2, :2])
    with pytest.raises(InputError, match="scale must be one of.*'max'"):
        pattern_distance(a, a, "max")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="change must be one of"):
        run().plot("score")  # type: ignore[arg-type]
