"""How a sweep runs its cells: in which batches, from which position, what is read out. The numbers do not change."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from families import FOLDERS, load
from helpers import TWO_STATES, make, tokens_for, waits, word_tokenizer
from patching_helpers import CASES, SITES, by_hand, case, cells, everywhere, legal_axes, prompts, run_clean, sizes_of
from torch import Tensor

from tl_looped import LoopedConfig, LoopedModel
from tl_looped.engine.errors import InputError
from tl_looped.patching import LoopPatchingResult, Source, batches, checks, patch_sweep, zero
from tl_looped.patching.batches import Batches
from tl_looped.patching.cells import Plan

pytestmark = pytest.mark.usefixtures("as_a_user")

EXACT: dict[str, Any] = {"rtol": 1e-9, "atol": 1e-10}
LENGTH = 4


@pytest.fixture
def starts(monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """As many blocks of positions as can be; where the batches of each sweep began."""
    found: list[list[int]] = []
    cut = Batches.__init__

    def record(self: Batches, *args: Any) -> None:
        cut(self, *args)
        found.append(sorted({batch.start for batch in self.all}))

    monkeypatch.setattr(Batches, "cost", lambda self, all: -len({batch.start for batch in all}))
    monkeypatch.setattr(Batches, "__init__", record)
    return found


def sweep(model: LoopedModel, tokens: Any, source: Any, site: str, axes: Any, **how: Any) -> LoopPatchingResult:
    options = {"reduce": "none", "progress": False, "n_loops": 2, "metric": everywhere(model), **how}
    return patch_sweep(model, tokens, source=source, site=site, axes=axes, **options)


def check(result: LoopPatchingResult, model: LoopedModel, tokens: Any, cache: Any, n: int, **how: Any) -> None:
    """Some cells by hand."""
    site, axes = result.site, result.axis_names
    for at in cells(sizes_of(model, site, axes, 2, LENGTH), n):
        logits = by_hand(model, tokens, lambda name, x: cache[name], 2, site, at, **how)
        torch.testing.assert_close(result.values[tuple(at.values())], everywhere(model)(logits), **EXACT)


# From a position on.


@pytest.mark.parametrize("name", CASES)
def test_what_comes_before_a_position_need_not_run_again(name: str, starts: list[list[int]]) -> None:
    model = case(name, torch.float64)
    clean, corrupted = prompts(model, pos=LENGTH)
    cache = run_clean(model, clean, 2)
    for site in (site for site in SITES if "pos" in SITES[site][1]):
        axes = [axes for axes in legal_axes(site) if "pos" in axes and "key" not in axes and "neuron" not in axes]
        looped = "loop" in max(axes, key=len)
        check(sweep(model, corrupted, cache, site, max(axes, key=len)), model, corrupted, cache, 4)
        if looped:
            check(
                sweep(model, corrupted, cache, site, ("pos",), when="every"), model, corrupted, cache, 2, when="every"
            )
    assert set(map(tuple, starts)) == {tuple(range(LENGTH))}


@pytest.mark.filterwarnings("ignore:.*was trained with a prefix")
@pytest.mark.parametrize("folder", FOLDERS)
def test_every_family_gives_what_single_runs_give(folder: str, starts: list[list[int]]) -> None:
    model = load(folder, torch.float64)
    clean, corrupted = (tokens_for(model, pos=LENGTH, seed=seed) for seed in (1, 8))
    metric, stack = everywhere(model), model.cfg.looping[-1]
    with torch.no_grad():
        cache, untouched = run_clean(model, clean, 2), metric(model(corrupted, 2))
        for site, component in (("z", "attn.hook_z"), ("state_post", "hook_state_post"), ("embed", "hook_embed")):
            layered, looped = site == "z", site != "embed"
            axes = (*(("loop",) if looped else ()), *(("layer",) if layered else ()), "pos")
            how = {"stack": stack} if looped else {}
            found, same = (
                sweep(model, corrupted, source, site, axes, **how) for source in (cache, run_clean(model, corrupted, 2))
            )
            torch.testing.assert_close(same.values, untouched.expand_as(same.values), **EXACT)
            of_stack = f"{stack}." if layered or len(model.cfg.looping) > 1 else ""
            for number, at in enumerate(found.index_df.to_dict("records")):
                layer = f"{at['layer']}." if layered else ""
                name = f"{of_stack}{layer}loop.{at['loop']}.{component}" if looped else component

                def write(x: Tensor, hook: Any, p: int = at["pos"]) -> None:
                    x[:, p] = cache[hook.name][:, p]

                alone = metric(model.run_with_hooks(corrupted, 2, fwd_hooks=[(name, write)]))
                torch.testing.assert_close(found.values.flatten(0, -2)[number], alone, **EXACT)
    assert all(one == (list(range(LENGTH)) if model.cfg.causal else [0]) for one in starts)


def test_keys_of_a_pattern_are_counted_from_the_first(starts: list[list[int]]) -> None:
    model = case("added", torch.float64)
    clean, corrupted = prompts(model, pos=LENGTH)
    cache = run_clean(model, clean, 2)
    for when in ("at", "from", "clamp"):
        result = sweep(model, corrupted, cache, "pattern", ("loop", "layer", "key", "pos"), when=when)
        check(result, model, corrupted, cache, 30, when=when)
    assert starts == [list(range(LENGTH))] * 3


@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_prompts_keep_their_masks(side: Any, starts: list[list[int]]) -> None:
    model = make(torch.float64, word_tokenizer(), n_prelude=1, n_coda=1, injection="add")
    clean, corrupted = ["a b c d", "b c"], ["a b e d", "b f"]
    with torch.no_grad():
        _, cache = model.run_with_cache(clean, 2, padding_side=side)
        result = sweep(model, corrupted, cache, "resid_pre", ("loop", "layer", "pos"), padding_side=side)
        tokens, mask = model.to_tokens_with_mask(corrupted, padding_side=side)
        for at in cells(sizes_of(model, "resid_pre", result.axis_names, 2, 4)):
            logits = by_hand(model, tokens, lambda name, x: cache[name], 2, "resid_pre", at, attention_mask=mask)
            torch.testing.assert_close(result.values[tuple(at.values())], everywhere(model)(logits), **EXACT)
    assert starts == [list(range(4))]


def test_layers_that_read_tokens_or_know_the_time_and_windows(starts: list[list[int]]) -> None:
    for changes in (
        {"value_embeds": (True, True), "value_gate_size": 4},
        {"loop_time": True, "final_norm": True},
        {"learned_positions": True, "rotary": None},
        {"loop_update": "residual"},
        {"score_cap": 3.0},
        {"windows": (2, None), "n_key_value_heads": 2},
    ):
        model = make(torch.float64, **changes)
        clean, corrupted = prompts(model, pos=LENGTH)
        cache = run_clean(model, clean, 2)
        for site, axes in (("z", ("loop", "layer", "head", "pos")), ("state", ("loop", "pos")), ("embed", ("pos",))):
            check(sweep(model, corrupted, cache, site, axes), model, corrupted, cache, 8)
    assert set(map(tuple, starts)) == {tuple(range(LENGTH))}


def test_where_a_token_may_see_a_later_one_all_positions_run(starts: list[list[int]]) -> None:
    model = case("bare", torch.float64)
    clean, corrupted = prompts(model, pos=LENGTH)
    seen = torch.ones(2, LENGTH, LENGTH, dtype=torch.bool)
    cache = run_clean(model, clean, 2, attention_mask=seen)
    result = sweep(model, corrupted, cache, "v", ("loop", "pos"), attention_mask=seen)
    check(result, model, corrupted, cache, 8, attention_mask=seen)
    cache = run_clean(model, clean, 2, attention_mask=seen.tril())
    result = sweep(model, corrupted, cache, "v", ("loop", "pos"), attention_mask=seen.tril())
    check(result, model, corrupted, cache, 8, attention_mask=seen.tril())
    assert starts == [[0], list(range(LENGTH))]
    both_ways, prefixed = make(torch.float64, causal=False), make(torch.float64, prefix_lm=True)
    for one, options in ((both_ways, {}), (prefixed, {"prefix_length": 3})):
        cache = run_clean(one, clean, 2, **options)
        check(sweep(one, corrupted, cache, "v", ("loop", "pos"), **options), one, corrupted, cache, 8, **options)
    assert starts[2:] == [[0], [0]]


def test_a_source_that_reads_the_activation_is_given_all_of_it(starts: list[list[int]]) -> None:
    model = case("bare", torch.float64)
    _, corrupted = prompts(model, pos=LENGTH)
    mean = Source("mean of its own", lambda site, x: x.mean(1, keepdim=True).expand_as(x))
    result = sweep(model, corrupted, mean, "resid_pre", ("loop", "layer", "pos"))
    for at in cells(sizes_of(model, "resid_pre", result.axis_names, 2, LENGTH), 8):
        logits = by_hand(model, corrupted, lambda name, x: x.mean(1, keepdim=True).expand_as(x), 2, "resid_pre", at)
        torch.testing.assert_close(result.values[tuple(at.values())], everywhere(model)(logits), **EXACT)
    assert starts == [[0]]


def test_two_stacks_from_a_position_on(starts: list[list[int]]) -> None:
    two_states = make(torch.float64, **{**TWO_STATES, "prefix_lm": False})
    tokens, other = (tokens_for(two_states, batch=2, pos=LENGTH, seed=seed) for seed in (1, 8))
    with torch.no_grad():
        source = two_states.run_with_cache(other, (2, 2))[1]
        for stack, site in (("L_blocks", "state"), ("H_blocks", "v")):
            found = sweep(two_states, tokens, source, site, ("loop", "pos"), stack=stack, n_loops=(2, 2))
            loops = two_states.cfg.schedule((2, 2)).n_loops(stack)
            for t in range(loops):
                for p in range(LENGTH):

                    def write(x: Tensor, hook: Any, p: int = p) -> None:
                        x[:, p] = source[hook.name][:, p]

                    names = [f"{stack}.{i}.loop.{t}.attn.hook_v" for i in range(2)]
                    names = [f"{stack}.loop.{t}.hook_state_pre"] if site == "state" else names
                    logits = two_states.run_with_hooks(tokens, (2, 2), fwd_hooks=[(name, write) for name in names])
                    torch.testing.assert_close(found.values[t, p], everywhere(two_states)(logits), **EXACT)
    assert starts == [list(range(LENGTH))] * 2


def test_the_cut_that_is_estimated_to_take_least_time_is_taken() -> None:
    made = []
    for d_model, pos in ((16, 4), (512, 32)):
        cfg = LoopedConfig(
            d_model=d_model, n_heads=2, d_head=d_model // 2, d_mlp=2 * d_model, d_vocab=5, n_ctx=64, n_core=2
        )
        plan = Plan(cfg, 4, pos, "resid_pre", ("loop", "layer", "pos"), "at", None)
        for at_once in (7, 1000):
            found = Batches(plan, at_once, 1, pos, True, torch.device("cpu"))
            made.append(len({batch.start for batch in found.all}))
            numbers = [
                plan.number(group, place) for batch in found.all for group, places in batch.parts for place in places
            ]
            assert sorted(numbers) == list(range(8 * pos))
            assert all(len(batch) <= at_once for batch in found.all)
            joins = [[group.first for group, _ in batch.parts] for batch in found.all]
            assert all(one == sorted(one) for one in joins)
    assert made[0] == made[1] == 1 and min(made[2:]) > 2


# In batches of any size.


def test_cells_alone_give_what_they_give_together(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("huginn", "ouro-gqa"):
        model = case(name, torch.float64)
        clean, corrupted = prompts(model, pos=LENGTH)
        cache = run_clean(model, clean, 2)
        asked = [("state", ("source_loop", "loop"), "at"), ("pattern", ("loop", "layer", "head"), "at")]
        asked += [("resid_mid", ("loop", "layer"), "clamp"), ("state_post", ("loop", "pos"), "from")]
        together = [sweep(model, corrupted, cache, site, axes, when=when) for site, axes, when in asked]
        for free in (checks.free_bytes(model.device), 0):  # with all states of the unpatched run kept, and with none
            monkeypatch.setattr(batches, "_AT_ONCE", {"cpu": 1})
            monkeypatch.setattr(checks, "free_bytes", lambda device, free=free: free)
            for (site, axes, when), one in zip(asked, together, strict=True):
                alone = sweep(model, corrupted, cache, site, axes, when=when)
                torch.testing.assert_close(alone.values, one.values, **EXACT)
                assert torch.equal(alone.baseline, one.baseline)
        monkeypatch.undo()


# What is read out.


@pytest.mark.parametrize("cut", [False, True])
def test_a_metric_may_read_some_positions(cut: bool, request: pytest.FixtureRequest) -> None:
    if cut:
        request.getfixturevalue("starts")
    model = case("added", torch.float64)
    clean, corrupted = prompts(model, pos=LENGTH)
    cache = run_clean(model, clean, 2)
    metric = everywhere(model)
    for positions, chosen in (("last", [-1]), ([-1], [-1]), ([2, 0], [2, 0]), ((3, 1, 2), [3, 1, 2])):
        for site, axes in (("resid_pre", ("loop", "layer", "pos")), ("embed", ("pos",)), ("z", ("loop", "head"))):
            found = sweep(model, corrupted, cache, site, axes, positions=positions)
            whole = sweep(model, corrupted, cache, site, axes, metric=lambda logits, at=chosen: metric(logits[:, at]))
            torch.testing.assert_close(found.values, whole.values, **EXACT)
            torch.testing.assert_close(found.baseline, whole.baseline, **EXACT)
    assert found.made_by["positions"] == [3, 1, 2] and "positions" not in whole.made_by


def test_the_last_position_of_padded_prompts_is_each_ones_own() -> None:
    model = make(torch.float64, word_tokenizer())
    clean, corrupted = ["a b c d", "b c"], ["a b e d", "b f"]
    with torch.no_grad():
        _, cache = model.run_with_cache(clean, 2)
    last = sweep(model, corrupted, cache, "z", ("loop",), positions="last")
    metric = everywhere(model)
    whole = sweep(
        model,
        corrupted,
        cache,
        "z",
        ("loop",),
        metric=lambda logits: metric(torch.stack((logits[0, 3:], logits[1, 1:2]))),
    )
    torch.testing.assert_close(last.values, whole.values, **EXACT)


def test_only_the_positions_that_are_read_go_through_the_head(monkeypatch: pytest.MonkeyPatch) -> None:
    model = case("bare")
    _, corrupted = prompts(model, pos=LENGTH)
    shapes = []
    forward = type(model.transformer.unembed).forward
    monkeypatch.setattr(
        type(model.transformer.unembed), "forward", lambda self, x: shapes.append(x.shape) or forward(self, x)
    )
    assert sweep(model, corrupted, zero(), "state", ("loop", "pos"), positions=[-1]).values.shape == (2, 4, 2)
    assert shapes[-1] == (8, 2, 1, model.cfg.d_model)


@pytest.mark.parametrize(
    ("positions", "message"),
    [
        ("first", "positions must be 'all', 'last' or a list of positions, got 'first'"),
        ([], "positions is empty, so a metric would be given nothing: pass 'all', 'last' or some"),
        ([4], "prompt 0: position 4 "),
    ],
)
def test_positions_that_there_are_not(positions: Any, message: str) -> None:
    model = case("bare")
    with pytest.raises(InputError, match=message):
        sweep(model, prompts(model, pos=LENGTH)[1], zero(), "state", ("loop",), positions=positions)


# Metrics.


def test_a_metric_of_tensor_operations_is_called_once_for_many_cells() -> None:
    model = case("bare", torch.float64)
    clean, corrupted = prompts(model, batch=3, pos=LENGTH)
    cache, answers = run_clean(model, clean, 2), torch.tensor([1, 2, 3])
    calls: list[str] = []

    def counted(name: str, metric: Callable[[Tensor], Any]) -> Callable[[Tensor], Any]:
        return lambda logits: calls.append(name) or metric(logits)

    def of_answers(logits: Tensor) -> Tensor:
        return logits[torch.arange(3), -1, answers]

    metrics = {
        "answers": of_answers,
        "numbers": lambda logits: torch.tensor([float(row[-1, i]) for row, i in zip(logits, answers, strict=True)]),
        "numpy": lambda logits: torch.from_numpy(logits.numpy()[range(3), -1, answers]),
    }
    counting = {name: counted(name, metric) for name, metric in metrics.items()}
    found = sweep(model, corrupted, cache, "resid_pre", ("loop", "pos"), metric=counting)
    assert calls.count("answers") == 2 and calls.count("numbers") > 8 and calls.count("numpy") > 8
    for at in cells({"loop": 2, "pos": LENGTH}):
        logits = by_hand(model, corrupted, lambda name, x: cache[name], 2, "resid_pre", at)
        for name in metrics:
            value = found[name].values[tuple(at.values())]
            torch.testing.assert_close(value, of_answers(logits), rtol=1e-6, atol=1e-6)


def test_nobody_waits_for_a_cell() -> None:
    """How often a sweep looks at numbers of the device does not depend on how many cells it has."""
    model = case("added")
    counts = []
    for n_loops in (1, 6):
        clean, corrupted = prompts(model, pos=LENGTH)
        cache = run_clean(model, clean, n_loops)
        with waits() as seen:
            for site, axes in (("pattern", ("loop", "layer", "head", "pos")), ("z", ("loop", "layer"))):
                sweep(model, corrupted, cache, site, axes, n_loops=n_loops, positions="last", batch_size=8)
        counts.append(len(seen))
    assert 0 < counts[0] == counts[1] < 50
