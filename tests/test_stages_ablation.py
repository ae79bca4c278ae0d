"""Massive activations: found where they were put, silenced where they are made."""

import math
import statistics
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import TINY, hook_count, make, tiny, tokens_for

from tl_looped import LoopedModel
from tl_looped.attention import TOTAL_VARIATION
from tl_looped.engine.errors import InputError
from tl_looped.observe import observe
from tl_looped.stages import (
    MIXING,
    RESIDUAL_ENTROPY,
    AblationEffect,
    MassiveActivations,
    ablation_effect,
    massive_activations,
    silence_mlp,
)
from tl_looped.stages.ablation import activation_ratios

DIM = 5


def massive(**changes: Any) -> LoopedModel:
    """A model whose core layer 1 writes a huge number into one dimension, of every token, in every loop."""
    model = make(**{**TINY["added"], **changes})
    with torch.no_grad():
        down = model.transformer.blocks[1].mlp.down.weight
        down[DIM] = 1e6 * torch.sign(down[DIM])
    return model


def test_ratios_are_to_the_median_of_each_prompt():
    x = torch.tensor([[[1.0, -2.0, 3.0]], [[10.0, 40.0, -20.0]]])
    assert activation_ratios(x).tolist() == [[[0.5, 1, 1.5]], [[0.5, 2, 1]]]
    even = torch.tensor([[1.0, -2.0], [4.0, 10.0]])  # its median is 3
    assert torch.allclose(activation_ratios(even), even.abs() / 3)
    assert activation_ratios(x.half()).dtype == torch.float32
    assert activation_ratios(torch.randn(2, 3, 4, 8)).shape == (2, 3, 4, 8)


def test_massive_activations_are_found_where_they_are_made():
    model = massive()
    prompt = tokens_for(model, 1, 6)
    result = massive_activations(model, prompt, 3, top=4)
    assert bool(result.massive().all()) and set(result.dim.tolist()) == {DIM}
    first = result.schedule.realised_depth("blocks", 1, 0)
    assert result.massive_from.tolist() == [first] * 4
    table = result.to_dataframe()
    assert table["ratio"].is_monotonic_decreasing and table["token"].isna().all()  # no tokenizer
    assert bool((result.largest_ratio[:first] < 1000).all()) and bool((result.largest_ratio[first:] > 1000).all())


@pytest.mark.parametrize("family", TINY)
def test_every_entry_against_a_full_cache(family: str):
    model = tiny(family)
    prompt = tokens_for(model, 1, 6)
    result = massive_activations(model, prompt, 3, top=3, min_size=2.0, min_ratio=4.0)
    _, cache = model.run_with_cache(prompt, 3)
    best: dict[tuple[int, int], tuple[float, int, float]] = {}
    first: dict[tuple[int, int], int] = {}
    for depth, (stack, layer, loop) in enumerate(result.schedule.layer_calls()):
        x = cache[f"{stack}.{layer}." + ("" if loop is None else f"loop.{loop}.") + "hook_resid_post"][0]
        sizes = sorted(abs(float(value)) for value in x.flatten())
        median = statistics.median(sizes)  # of an even count
        assert float(result.largest_ratio[depth]) == pytest.approx(sizes[-1] / median, rel=1e-5)
        entries = [(pos, dim) for pos in range(6) for dim in range(model.cfg.d_model)]
        for place in sorted(entries, key=lambda place: -abs(float(x[place])))[:3]:
            size = float(x[place])
            ratio = abs(size) / median
            if place not in best or ratio > best[place][0]:
                best[place] = (ratio, depth, size)
            if abs(size) >= 2 and ratio >= 4:
                first.setdefault(place, depth)
    expected = sorted(best, key=lambda place: -best[place][0])[:3]
    assert list(zip(result.pos.tolist(), result.dim.tolist(), strict=True)) == expected
    for entry, place in enumerate(expected):
        ratio, depth, size = best[place]
        assert float(result.ratio[entry]) == pytest.approx(ratio, rel=1e-5)
        assert int(result.depth[entry]) == depth and float(result.size[entry]) == pytest.approx(size)
        assert float(result.massive_from[entry]) == pytest.approx(first.get(place, math.nan), nan_ok=True)


def test_a_normalised_stream_has_no_massive_activations():
    model = massive(**TINY["huginn"])
    result = massive_activations(model, tokens_for(model, 1, 6), 3)
    assert not bool(result.massive().any()) and bool(result.massive_from.isnan().all())
    assert "no massive activation" in result.plot().layout.title.text


def test_tables_figures_and_files(tmp_path: Path):
    model = LoopedModel.from_pretrained("looped-hops", device="cpu")
    result = massive_activations(model, "a=4; c=a; ? c", 3, top=5)
    table = result.to_dataframe()
    tokens = model.to_str_tokens("a=4; c=a; ? c")
    assert table["token"].tolist() == [tokens[pos] for pos in table["pos"]]
    assert [result.schedule.at_depth(depth)[0] for depth in table["depth"]] == table["stack"].tolist()
    line = result.plot("layer").data[1]
    depth = result.schedule.realised_depth("blocks", 1, 2)
    assert line.y[2] == pytest.approx(float(result.largest_ratio[depth]), rel=1e-4)
    loaded = MassiveActivations.load(result.save(tmp_path / "massive"))
    assert loaded.str_tokens == result.str_tokens and torch.equal(loaded.ratio, result.ratio)


@pytest.mark.parametrize("family", TINY)
@pytest.mark.parametrize(("loops", "chosen"), [(None, {0, 1, 2}), (1, {1}), ([0, -1], {0, 2})])
def test_a_silent_mlp_adds_nothing_at_its_loops(family: str, loops: Any, chosen: set[int]):
    model = tiny(family)
    tokens = tokens_for(model)
    with model.hooks(fwd_hooks=silence_mlp(model, 1, loops, n_loops=3)):
        _, cache = model.run_with_cache(tokens, 3)
    for layer in range(2):
        for t in range(3):
            silent = bool((cache["mlp_out", layer, t] == 0).all())
            assert silent == (layer == 1 and t in chosen)
    assert hook_count(model) == 0


def test_the_effect_of_an_ablation_is_that_of_two_runs():
    model, prompts = massive(), [[1, 2, 3, 4], [5, 6, 7], [8, 9, 1, 2]]
    result = ablation_effect(model, prompts, layer=1, loops=[0, 2], n_loops=3, progress=False)
    clean = observe(model, prompts, 3, measures=[MIXING, RESIDUAL_ENTROPY], progress=False)
    with model.hooks(fwd_hooks=silence_mlp(model, 1, [0, 2], n_loops=3)):
        silent = observe(model, prompts, 3, measures=[MIXING, RESIDUAL_ENTROPY], progress=False)
    torch.testing.assert_close(result.clean["mixing"], clean["mixing"].mean((0, 2)))
    torch.testing.assert_close(result.ablated["mixing"], silent["mixing"].mean((0, 2)))
    torch.testing.assert_close(result.ablated["residual_entropy"], silent["residual_entropy"].mean(0))
    torch.testing.assert_close(result.change("mixing"), result.ablated["mixing"] - result.clean["mixing"])
    assert hook_count(model) == 0


def test_without_its_mlp_the_stream_is_no_longer_compressed():
    model = massive()
    result = ablation_effect(model, tokens_for(model), layer=1, n_loops=3, progress=False)
    made = [result.schedule.realised_depth("blocks", 1, t) for t in range(3)]
    assert bool((result.clean["residual_entropy"][made] < 0.01).all())
    assert bool((result.ablated["residual_entropy"][made] > 0.3).all())
    assert float(result.change("residual_entropy")[0]) == 0  # the prelude comes before
    assert bool((result.ablated["magnitude"][made] < result.clean["magnitude"][made] / 100).all())


def test_a_silent_layer_that_runs_once():
    model = tiny("llama")
    result = ablation_effect(model, tokens_for(model), layer=0, stack="coda", n_loops=2, progress=False)
    last = result.schedule.depth - 1
    assert float(result.change("magnitude")[last]) != 0 and not bool(result.change("magnitude")[:last].any())
    assert result.made_by["silent"] == "MLP of coda.0 silent"


def test_other_measures_and_figures_and_files(tmp_path: Path):
    model = tiny("ouro")
    options: dict[str, Any] = {"n_loops": 3, "progress": False}
    result = ablation_effect(model, tokens_for(model), layer=-1, loops=1, measures=[TOTAL_VARIATION, MIXING], **options)
    assert bool(result.clean["total_variation"][:2].isnan().all())
    table = result.to_dataframe()
    assert len(table) == 2 * 6 and table["loop"].tolist()[:6] == [0, 0, 1, 1, 2, 2]
    assert table["ablated"].tolist()[6:] == result.ablated["mixing"].tolist()
    both, change = result.plot("mixing"), result.plot("mixing", "layer")
    assert [trace.name for trace in both.data] == ["ablated", "clean"]
    assert list(both.data[1].y) == pytest.approx(result.clean["mixing"].tolist(), rel=1e-4)
    assert list(change.data[0].y) == pytest.approx(result.change("mixing")[[0, 2, 4]].tolist(), rel=1e-4, abs=1e-9)
    assert "MLP of blocks.1 silent in loop 1" in both.layout.title.text
    loaded = AblationEffect.load(result.save(tmp_path / "effect"))
    assert torch.equal(loaded.ablated["mixing"], result.ablated["mixing"])
    with pytest.raises(InputError, match="no measure 'mixin'.*Nearest: 'mixing'"):
        result.change("mixin")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layer": 2}, "layer 2 is out of range"),
        ({"layer": 0, "loops": 3}, "loop 3 is out of range"),
        ({"layer": 0, "loops": []}, "loops is empty"),
        ({"layer": 0, "loops": 0, "stack": "prelude"}, "the prelude runs once: leave loops out"),
        ({"layer": 0, "stack": "block"}, "there is no stack 'block'.*Nearest: 'blocks'"),
        ({"layer": 0, "loops": True}, "loop must be an integer, got True"),
        ({"layer": 0, "loops": 1.0}, "loop must be an integer, got 1.0"),
    ],
)
@pytest.mark.usefixtures("as_a_user")
def test_what_can_not_be_silenced(options: dict[str, Any], message: str):
    model = tiny("llama")
    with pytest.raises(InputError, match=message):
        silence_mlp(model, **options, n_loops=3)
    with pytest.raises(InputError, match=message):
        ablation_effect(model, tokens_for(model), **options, n_loops=3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"top": 0}, "top must be at least 1"),
        ({"min_ratio": -1.0}, "min_ratio must be a finite number of at least 0, got -1.0"),
        ({"prompts": torch.zeros(2, 4, dtype=torch.int64)}, "one prompt, got 2"),
    ],
)
def test_what_the_search_refuses(options: dict[str, Any], message: str):
    model = tiny("llama")
    with pytest.raises(InputError, match=message):
        massive_activations(model, **{"prompts": tokens_for(model, 1), **options})


def test_a_state_that_is_not_finite_is_named():
    model = make(**TINY["llama"])
    with torch.no_grad():
        model.transformer.injection.weight.fill_(1e38)
    with pytest.raises(InputError, match="not finite from 'blocks.0.loop.0.hook_resid_post', position 0 on"):
        massive_activations(model, tokens_for(model, 1), 2)
    assert hook_count(model) == 0


def test_two_runs_do_not_share_a_file():
    with pytest.raises(InputError, match="ablation_effect has no argument 'save_to'"):
        ablation_effect(tiny("llama"), tokens_for(tiny("llama")), layer=0, save_to="file")
