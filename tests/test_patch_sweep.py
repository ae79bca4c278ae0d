"""patch_sweep against one whole run with hooks for every cell, and against TransformerLens's own patching."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from helpers import hook_count, make, word_tokenizer
from patching_helpers import (
    CASES,
    HEADS,
    LAYER_SITES,
    LOOP_SITES,
    NEURONS,
    PATTERN,
    POS,
    SITES,
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
from transformer_lens import patching

from tl_looped import LoopedModel
from tl_looped.patching import LoopPatchingResult, patch_sweep

# Many small runs: the checks of types at run time would be most of the time. Other tests of sweeps have them on.
pytestmark = pytest.mark.usefixtures("as_a_user")

EXACT = {"rtol": 1e-9, "atol": 1e-10}  # the models here are in float64, so what agrees, agrees closely
LENGTH = 4


def double(name: str) -> LoopedModel:
    return case(name, torch.float64)


def sweep(
    model: LoopedModel, corrupted: Tensor, source: Any, site: str, axes: Any, **options: Any
) -> LoopPatchingResult:
    """A sweep with a metric for each prompt, kept."""
    options = {"reduce": "none", "progress": False, "n_loops": 2, **options}
    return patch_sweep(model, corrupted, source=source, metric=everywhere(model), site=site, axes=axes, **options)


def check_cells(
    model: LoopedModel, site: str, axes: tuple[str, ...], n: int, seed: int = 8, dims: Any = None, **how: Any
) -> LoopPatchingResult:
    """Sweep, and do `n` of the cells by hand, or with n = 0 all of them."""
    clean, corrupted = prompts(model, pos=LENGTH)
    cache = run_clean(model, clean, 2)
    result = sweep(model, corrupted, cache, site, axes, **how)
    sizes = sizes_of(model, site, axes, 2, LENGTH)
    assert result.values.shape == (*sizes.values(), 2)
    assert result.axis_names == list(axes)
    for at in cells(sizes, n or None, seed):
        logits = by_hand(model, corrupted, lambda name, x: cache[name], 2, site, at, dims, **how)
        torch.testing.assert_close(
            result.values[tuple(at.values())],
            everywhere(model)(logits),
            **EXACT,
            msg=lambda text: f"{site} {at} {how}: {text}",
        )
    return result


# Every site, on every family.


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("sites", [list(LAYER_SITES)[:6], list(LAYER_SITES)[6:], list(SITES)[len(LAYER_SITES) :]])
def test_every_site_gives_what_single_runs_give(name: str, sites: list[str]) -> None:
    model = double(name)
    for site in sites:
        if site == "post":
            axes = ("neuron", "loop", "layer")
        else:
            axes = max(legal_axes(site), key=len)[:: -1 if site in ("q", "mlp_out") else 1]
            axes = tuple(axis for axis in axes if axis not in ("source_loop", "key"))
        check_cells(model, site, axes, 3)
    assert hook_count(model) == 0


@pytest.mark.parametrize(
    ("site", "dims", "axes"),
    [
        ("attn.hook_attn_scores", PATTERN, ("loop", "layer", "head", "pos", "key")),
        ("attn.hook_rot_q", HEADS, ("loop", "layer", "head")),
        ("attn.hook_rot_k", HEADS, ("loop", "layer", "head", "pos")),
        ("attn.hook_result", HEADS, ("head", "loop", "layer")),
        ("mlp.hook_pre", NEURONS, ("loop", "layer", "neuron")),
        ("mlp.hook_pre_linear", NEURONS, ("loop", "layer", "pos")),
        ("ln1.hook_scale", POS, ("loop", "layer", "pos")),
        ("ln2.hook_normalized", POS, ("pos", "layer", "loop")),
        ("ln1_post.hook_normalized", POS, ("loop", "layer")),
        ("hook_injection_in", POS, ("loop", "pos")),
        ("ln_loop.hook_scale", POS, ("loop", "pos")),
        ("ln_final.hook_normalized", POS, ("pos",)),
    ],
)
def test_any_components_name_is_a_site(site: str, dims: dict[str, int], axes: tuple[str, ...]) -> None:
    check_cells(double("mixed"), site, axes, 5, dims=dims)


def test_the_norm_before_the_coda_is_a_site() -> None:
    check_cells(double("huginn"), "ln_coda.hook_normalized", ("pos",), 3, dims=POS)


def test_the_exit_gate_reads_and_changes_nothing() -> None:
    result = check_cells(double("ouro"), "hook_exit_gate", ("loop",), 0, dims={})
    assert torch.equal(result.values, result.baseline.expand(2, 2))


# Every set of axes, and where in time.


@pytest.mark.parametrize("site", ["resid_pre", "z", "k", "pattern", "post", "state", "initial_state", "embed"])
def test_every_set_of_axes_gives_what_single_runs_give(site: str) -> None:
    model = double("added")
    chosen = [axes for axes in legal_axes(site) if len(axes) < 4 or "key" not in axes]
    for number, axes in enumerate(chosen):
        order = list(itertools.permutations(axes))
        axes = order[number % len(order)]
        when = ["at", "from", "clamp"][number % 3] if "loop" in axes else "every"
        if when == "clamp" and "source_loop" in axes:
            when = "from"
        if site in ("initial_state", "embed"):
            when = "at"
        check_cells(model, site, axes, 2, seed=number, when=when)


@pytest.mark.parametrize("name", ["ouro", "huginn", "bare"])
@pytest.mark.parametrize("site", ["resid_mid", "state", "state_post", "v"])
def test_where_in_time_and_from_which_loop(name: str, site: str) -> None:
    model = double(name)
    layer = ("layer",) if site in LAYER_SITES else ()
    for when, source_loop in itertools.product(("at", "from", "clamp"), (None, 1, -2)):
        if when != "clamp" or source_loop is None:
            check_cells(model, site, ("loop", *layer), 4, when=when, source_loop=source_loop)
    for when, axes in (("at", ("source_loop", "loop")), ("from", ("loop", "source_loop")), ("every", ("source_loop",))):
        check_cells(model, site, axes, 0, when=when)
    check_cells(model, site, (*layer, "pos"), 4, when="every", source_loop=0)


@pytest.mark.parametrize("name", CASES)
def test_the_diagonal_of_the_loop_matrix_is_the_plain_sweep(name: str) -> None:
    model = double(name)
    clean, corrupted = prompts(model, pos=LENGTH)
    cache = run_clean(model, clean, 3)
    for site in ("state", "state_post", "resid_pre"):
        matrix = sweep(model, corrupted, cache, site, ("source_loop", "loop"), n_loops=3)
        plain = sweep(model, corrupted, cache, site, ("loop",), n_loops=3)
        torch.testing.assert_close(matrix.values.diagonal(dim1=0, dim2=1).T, plain.values, **EXACT)
        assert not torch.allclose(matrix.values[0, 1], plain.values[1])  # another loop's state is another state
        row = sweep(model, corrupted, cache, site, ("loop",), n_loops=3, source_loop=2)
        torch.testing.assert_close(matrix.values[2], row.values, **EXACT)


@pytest.mark.parametrize("n_loops", [1, 4])
def test_other_loop_counts(n_loops: int) -> None:
    model = double("huginn")
    clean, corrupted = prompts(model, pos=LENGTH)
    cache = run_clean(model, clean, n_loops)
    result = sweep(model, corrupted, cache, "state_post", ("loop", "pos"), n_loops=n_loops)
    for at in cells({"loop": n_loops, "pos": LENGTH}):
        logits = by_hand(model, corrupted, lambda name, x: cache[name], n_loops, "state_post", at)
        torch.testing.assert_close(result.values[tuple(at.values())], everywhere(model)(logits), **EXACT)


def test_a_given_state_and_a_seed_are_those_of_the_patched_run() -> None:
    model = double("huginn")
    clean, corrupted = prompts(model, pos=LENGTH)
    with torch.no_grad():
        state = model(clean, seed=7, stop_at_loop=1)
    for options in ({"seed": 7}, {"initial_state": state}):
        cache = run_clean(model, clean, 2, **options)
        for site in ("resid_pre", "initial_state", "embed"):
            axes = ("loop", "layer", "pos") if site == "resid_pre" else ("pos",)
            result = sweep(model, corrupted, cache, site, axes, **options)
            for at in cells(sizes_of(model, site, axes, 2, LENGTH), 4):
                logits = by_hand(model, corrupted, lambda name, x, c=cache: c[name], 2, site, at, **options)
                torch.testing.assert_close(result.values[tuple(at.values())], everywhere(model)(logits), **EXACT)
            assert result.made_by["initial_state"] == ("seed 7" if "seed" in options else "given")


def test_padded_prompts_are_patched_with_their_own_masks() -> None:
    model = make(torch.float64, word_tokenizer(), n_prelude=1, n_coda=1, injection="add")
    clean, corrupted = ["a b c d", "b c"], ["a b e d", "b f"]
    with torch.no_grad():
        _, cache = model.run_with_cache(clean, 2)
        tokens = model.to_tokens(corrupted)
        assert not bool(cache.run.attention_mask.all())
        result = sweep(model, corrupted, cache, "resid_pre", ("loop", "layer", "pos"), batch_size=6)
        for at in cells(sizes_of(model, "resid_pre", result.axis_names, 2, 4), 6):
            logits = by_hand(model, tokens, lambda name, x: cache[name], 2, "resid_pre", at)
            torch.testing.assert_close(result.values[tuple(at.values())], everywhere(model)(logits), **EXACT)


@pytest.mark.parametrize("changes", [{}, {"injection": "add", "n_prelude": 1, "loop_norm": "each"}])
def test_a_single_core_layer(changes: dict[str, Any]) -> None:
    model = make(torch.float64, n_core=1, **changes)
    for site in (*LOOP_SITES, "resid_pre", "resid_post", "pattern"):
        check_cells(model, site, ("loop", "pos"), 0)
        check_cells(model, site, ("pos", "loop"), 3, when="from")


# Batches.


@pytest.mark.parametrize("name", ["ouro-gqa", "huginn", "retrofit-olmo2"])
@pytest.mark.parametrize(("site", "axes"), [("resid_mid", ("loop", "layer", "pos")), ("z", ("head", "loop", "pos"))])
def test_results_do_not_depend_on_the_batch_size(name: str, site: str, axes: tuple[str, ...]) -> None:
    model = case(name)  # float32
    clean, corrupted = prompts(model, batch=3, pos=LENGTH)
    cache = run_clean(model, clean, 2)
    results = [
        sweep(model, corrupted, cache, site, axes, batch_size=size, reduce="mean", n_loops=2)
        for size in (3, 4, 11, 1000, None)
    ]
    spread = results[0].values.std()
    assert spread > 1e-2
    for other in results[1:]:
        torch.testing.assert_close(other.values, results[0].values, rtol=1e-5, atol=float(1e-5 * spread))
        assert torch.equal(other.baseline, results[0].baseline)


def test_a_prompts_numbers_do_not_depend_on_the_other_prompts() -> None:
    model = double("huginn")
    clean, corrupted = prompts(model, batch=3, pos=LENGTH)
    together = sweep(model, corrupted, run_clean(model, clean, 2), "v", ("loop", "layer", "head", "pos"))
    for row in range(3):
        one = slice(row, row + 1)
        alone = sweep(model, corrupted[one], run_clean(model, clean[one], 2), "v", together.axis_names)
        torch.testing.assert_close(together.values[..., one], alone.values, **EXACT)


def test_no_batch_is_larger_than_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    model = double("ouro-gqa")
    clean, corrupted = prompts(model, pos=LENGTH)
    cache = run_clean(model, clean, 2)
    rows = []
    finish = type(model.transformer).finish

    def spy(self: Any, state: Tensor, frame: Any) -> Tensor:
        rows.append(len(state))
        return finish(self, state, frame)

    monkeypatch.setattr(type(model.transformer), "finish", spy)
    sweep(model, corrupted, cache, "z", ("loop", "layer", "pos", "head"), batch_size=11)
    # the unpatched run; and 2 loops of 2 layers, 16 cells of 2 prompts in each, 5 cells at once
    assert rows == [2] + [10] * 12 + [8]


def test_only_what_a_patch_can_change_is_run_again(monkeypatch: pytest.MonkeyPatch) -> None:
    model = double("huginn")
    clean, corrupted = prompts(model, pos=LENGTH)
    cache = run_clean(model, clean, 3)
    calls = []
    forward = type(model.transformer.blocks[0]).forward
    places = {
        id(block): f"{stack}{i}"
        for stack in ("prelude", "blocks", "coda")
        for i, block in enumerate(getattr(model.transformer, stack))
    }

    def spy(self: Any, x: Tensor, frame: Any, loop: int | None = None) -> Tensor:
        calls.append((places[id(self)], len(x)))
        return forward(self, x, frame, loop)

    monkeypatch.setattr(type(model.transformer.blocks[0]), "forward", spy)
    sweep(model, corrupted, cache, "resid_mid", ("loop", "layer", "pos"), n_loops=3)
    loops, core, rows = 3, 3, LENGTH * 2  # of every loop and layer, prompts and positions
    assert calls.count(("prelude0", 2)) == 1 and sum(name == "prelude0" for name, _ in calls) == 1
    unpatched = [("blocks", 2)] * loops * core
    growing = [("blocks", rows * (1 + i)) for i in range(loops * core)]  # from the patched layer to the last
    assert [(name[:-1], n) for name, n in calls if name[:-1] == "blocks"] == unpatched + growing
    assert [n for name, n in calls if name == "coda0"] == [2, loops * core * rows]


# The same numbers as TransformerLens.


@pytest.mark.parametrize("name", CASES)
def test_the_numbers_are_those_of_transformerlens_on_the_unrolled_view(name: str) -> None:
    model = double(name)
    clean, corrupted = prompts(model, pos=3, changed=1)
    view = model.unrolled(2)
    core = slice(model.cfg.n_prelude, model.cfg.n_prelude + 2 * model.cfg.n_core)
    shape = (2, model.cfg.n_core)
    with torch.no_grad():
        _, cache = view.run_with_cache(clean)
        theirs = patching.get_act_patch_resid_pre(
            view, corrupted, cache, direction(model), reduce="none", baseline=True
        )
        heads = patching.get_act_patch_attn_head_v_all_pos(view, corrupted, cache, direction(model), reduce="none")
    options = {"n_loops": 2, "reduce": "none", "progress": False}
    clean_cache = run_clean(model, clean, 2)
    ours = patch_sweep(model, corrupted, source=clean_cache, metric=direction(model), site="resid_pre", **options)
    torch.testing.assert_close(ours.values.float(), theirs.values[core].unflatten(0, shape), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ours.baseline.float(), theirs.baseline, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ours.effect().float(), theirs.effect()[core].unflatten(0, shape), rtol=1e-4, atol=1e-4)
    ours = patch_sweep(
        model,
        corrupted,
        source=clean_cache,
        metric=direction(model),
        site="v",
        axes=("loop", "layer", "head"),
        **options,
    )
    torch.testing.assert_close(ours.values.float(), heads.values[core].unflatten(0, shape), rtol=1e-5, atol=1e-5)


def test_the_default_sweep_is_the_residual_stream_over_loops_layers_and_positions() -> None:
    model = double("bare")
    clean, corrupted = prompts(model, pos=LENGTH)
    result = patch_sweep(
        model, corrupted, source=run_clean(model, clean), metric=lambda logits: logits[:, -1, 0].mean(), progress=False
    )
    assert result.axis_names == ["loop", "layer", "pos"] and result.values.shape == (2, 2, LENGTH)
    assert result.site == "resid_pre" and result.reduced and result.metric_names == ["metric"]
    assert result.made_by["n_loops"] == 2 and result.made_by["when"] == "at" and result.made_by["source"] == "cache"
    assert sorted(LOOP_SITES) == ["injection", "state", "state_post"]
