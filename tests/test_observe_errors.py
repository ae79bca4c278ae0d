"""What collection refuses, what it says about activations that are not finite, and how it goes on from a file."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch
from helpers import TINY, hook_count, make, tiny, word_tokenizer
from torch import Tensor, nn

from tl_looped import LoopedModel
from tl_looped.engine.errors import InputError
from tl_looped.observe import Measure, observe
from tl_looped.observe.observed import Observed

RESID = "hook_resid_post"
PROMPTS = [[3, 1, 4], [1, 5, 9, 2, 6], [7, 7, 8], [2, 7, 1, 8], [6, 6, 6]]


def norm(x: Tensor) -> Tensor:
    return x.norm(dim=-1)


def share_above(x: Tensor, threshold: float) -> Tensor:
    return (x > threshold).float().mean(-1)


def distance(x: Tensor, other: Tensor) -> Tensor:
    return (x - other).norm(dim=-1)


NORM = Measure("norm", "‖x‖", "L2", RESID, norm, axes=("pos",))
STEP = Measure("step", "step", "L2", RESID, distance, "previous", ("pos",))


def run(model: Any, measures: Any = (NORM, STEP), n_loops: int | None = 3, **options: Any) -> Observed:
    return observe(model, options.pop("prompts", PROMPTS), n_loops, measures=measures, progress=False, **options)


def never(x: Tensor, *others: Tensor) -> NoReturn:
    raise AssertionError("ran before all of the input was checked")


@pytest.fixture
def one_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """A measure's function is called once for every layer call."""
    monkeypatch.setattr(importlib.import_module("tl_looped.observe.batch"), "_AT_ONCE", 1)


# Bad input.

_CASES: list[tuple[dict[str, Any], str]] = [
    ({"measures": []}, r"measures must be a list of at least one Measure, got \[\]"),
    ({"measures": [Measure("a", "", "", RESID, never)] * 2}, "there are two measures 'a': give each its own name"),
    (
        {"measures": [Measure("a", "", "", RESID, never, "previous")], "n_loops": 1},
        "measure 'a' compares loops, but this run has one: pass n_loops of at least 2",
    ),
    (
        {"measures": [Measure("a", "", "", "ln1_post.hook_scale", never)]},
        "measure 'a' reads 'ln1_post.hook_scale': this model has no hook point .*Nearest: ",
    ),
    (
        {"measures": [Measure("a", "", "", "the pattern", never)]},
        "measure 'a' reads 'the pattern': there is no site 'the pattern'. Nearest: 'pattern'",
    ),
    (
        {"measures": [Measure("a", "", "", "embed", never, "last")]},
        "measure 'a' compares loops, but 'embed' fires once in a run",
    ),
    (
        {"measures": [Measure("a", "", "", "readout", never)]},
        r"measure 'a' reads read-outs, which come some positions at a time: .* axes=\('pos', ...\), got \(\)",
    ),
    ({"per_token": ["nrm"]}, r"per_token: there is no measure 'nrm', but \['norm', 'step'\]. Nearest: 'norm'"),
    (
        {"measures": [Measure("a", "", "", RESID, never)], "per_token": "a"},
        "per_token: the measure 'a' has no numbers for each token",
    ),
    ({"n_loops": 0}, "n_loops must be at least 1, got 0"),
    ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
    ({"seed": -1}, "seed must be an integer of at least 0, got -1"),
    ({"prompts": []}, "there are no prompts"),
    ({"prompts": [[1], []]}, "prompt 1 is empty"),
    ({"prompts": [[1], [2, 99]]}, r"prompt 1: token id 99 is out of the vocabulary \[0, 24\)"),
    ({"prompts": [[1], [2] * 33]}, "prompt 1 has 33 tokens, more than the model's context of 32"),
    ({"prompts": ["a b"]}, "prompt 0: this model has no tokenizer"),
    (
        {"initial_state": torch.zeros(2, 16)},
        r"initial_state must be .* \[pos, d_model\] for all rows alike, with at least 5 positions",
    ),
    ({"initial_state": torch.zeros(5)}, r"initial_state must be .*, got \(5,\)"),
    (
        {"initial_state": torch.zeros(4, 5, 16)},
        r"initial_state must be a tensor of shape \(5, 5, 16\) .* got \(4, 5, 16\)",
    ),
    ({"initial_state": torch.zeros(5, 16, dtype=torch.float64)}, "initial_state is torch.float64, the model torch.fl"),
    ({"save_to": "/nowhere/file"}, "'/nowhere/file' can't be written: there is no folder '/nowhere'"),
]


@pytest.mark.usefixtures("as_a_user")
@pytest.mark.parametrize(("changes", "message"), _CASES, ids=[message[:40] for _, message in _CASES])
def test_bad_input_is_refused_before_anything_runs(changes: dict[str, Any], message: str) -> None:
    model = tiny("llama")
    options: dict[str, Any] = {"measures": [NORM, STEP], **changes}
    with model.hooks([("hook_embed", never)]), pytest.raises(InputError, match=message):
        run(model, **options)
    assert hook_count(model) == 0


@pytest.mark.usefixtures("as_a_user")
def test_a_way_to_compare_that_there_is_not() -> None:
    unknown: Any = "next"
    with pytest.raises(
        InputError,
        match=r"measure 'a': compare must be one of \('none', 'previous', 'previous_two', 'last'\), got 'next'",
    ):
        run(tiny("llama"), [Measure("a", "", "", RESID, never, unknown)])


def test_a_model_in_training_mode_is_refused() -> None:
    model = make().train()
    with pytest.raises(InputError, match="the model is in training mode: call model.eval"):
        run(model)


def test_hooks_that_this_run_does_not_reach_are_errors() -> None:
    model = tiny("llama")
    message = "'blocks.0.loop.3.hook_mlp_out', which this run does not reach"
    with model.hooks([("blocks.0.loop.3.hook_mlp_out", never)]), pytest.raises(InputError, match=message):
        run(model)


@pytest.mark.parametrize(
    ("function", "axes", "message"),
    [
        (norm, (), r"measure 'a' must give \[batch\] of 'hook_resid_post' of shape .* got shape \(\d+, \d\)"),
        (norm, ("head", "pos"), r"measure 'a' must give \[batch, head, pos\] .* got shape"),
        (lambda x: x.flatten(1), ("pos",), r"measure 'a' must give \[batch, pos\] .* got shape \(\d+, 48\)"),
        (lambda x: x.sum(), (), r"must give \[batch\] .* got shape \(\)"),
        (lambda x: 1.0, (), "must give .* got float"),
        (lambda x: x[0, :, 0], ("head",), r"must give \[batch, head\] .* got shape \(3,\)"),
        (lambda x: x.mean(-1), ("head",), r"gave shape \(4,\) for prompt 3, but \(3,\) for one before"),
    ],
)
def test_a_measure_of_another_shape_than_it_says(function: Any, axes: tuple[str, ...], message: str) -> None:
    with pytest.raises(InputError, match=message):
        run(tiny("llama"), [Measure("a", "", "", RESID, function, axes=axes)])


@pytest.mark.usefixtures("one_at_a_time")
def test_a_measure_whose_layers_differ() -> None:
    widths = iter(range(1, 100))
    measure = Measure("a", "", "", RESID, lambda x: x[:, 0, : next(widths)], axes=("head",))
    with pytest.raises(
        InputError, match=r"'a' gave shape \(1,\) for each prompt at one place, and \(2,\) at 'blocks.0.loop.0"
    ):
        run(tiny("llama"), [measure])


def test_what_a_result_does_not_have() -> None:
    result = run(tiny("ouro"), [NORM])
    for call in (result.mean, result.by_loop, result.plot, result.to_dataframe):
        with pytest.raises(InputError, match=r"no measure 'nrm' here, but \['norm'\]. Nearest: 'norm'"):
            call("nrm")
    for q in (-0.1, 1.5):
        with pytest.raises(InputError, match="q must be a number of at least 0 and at most 1, got"):
            result.quantile("norm", q)
    plain = run(tiny("ouro").unrolled(), [NORM], None)
    with pytest.raises(InputError, match=r"this model has no loops \(blocks 4\): take mean\('norm'\)"):
        plain.by_loop("norm")


# Feedforward models.


def test_what_a_feedforward_model_does_not_have() -> None:
    view = tiny("llama").unrolled()
    with pytest.raises(InputError, match="measure 'step' compares loops, but this model has none: leave it out"):
        run(view, [STEP], None)
    for name, value in {"n_loops": 2, "seed": 1, "initial_state": torch.zeros(5, 16)}.items():
        with pytest.raises(InputError, match=f"this model has no loops, so leave out {name}"):
            run(view, [NORM], **{"n_loops": None, name: value})
    with pytest.raises(InputError, match="there is no site 'hook_resid_pots'.* Nearest: .*'hook_resid_p"):
        run(view, [Measure("a", "", "", "hook_resid_pots", norm, axes=("pos",))], None)


class Fake(nn.Module):
    """A model of two layers whose hooks fire as often as it is told."""

    def __init__(self, times: dict[str, int]):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))
        self.times = times
        self.cfg = tiny("llama").unrolled().cfg
        self.cfg.n_layers = 2
        self.hook_dict = {f"blocks.{layer}.{RESID}": None for layer in range(2)}
        self.eval()

    def run_with_hooks(self, tokens: Tensor, fwd_hooks: Any, return_type: Any) -> None:
        for name, hook in fwd_hooks:
            for time in range(self.times[name]):
                hook(torch.full((*tokens.shape, 4), float(time)), hook=None)

    def run_with_cache(self, *args: Any) -> NoReturn:
        raise AssertionError("not needed")

    to_tokens = run_with_cache


@pytest.mark.parametrize(
    ("first", "second", "message"),
    [
        (2, 1, "'blocks.0.hook_resid_post' fired twice in one forward, so this model loops"),
        (1, 0, "'blocks.1.hook_resid_post' did not fire in a forward of this model"),
    ],
)
def test_layers_that_do_not_run_once(first: int, second: int, message: str) -> None:
    model = Fake({f"blocks.0.{RESID}": first, f"blocks.1.{RESID}": second})
    with pytest.raises(InputError, match=message):
        run(model, [NORM], None)


# Activations that are not finite.


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("component", [RESID, "attn.hook_pattern"])
def test_activations_that_are_not_finite_are_named_where_they_began(value: float, component: str) -> None:
    model = tiny("llama")
    measure = Measure("a", "", "", component, lambda x, other: x.flatten(1).sum(1), "last")

    def put(x: Tensor, hook: Any) -> Tensor:
        rows = x.clone()
        rows[rows.shape[0] // 2, -1, 5] = value
        return rows

    message = r"prompt 2: .* from 'blocks.1.loop.2.hook_mlp_out' \(layer 1, loop 2\) on"
    with model.hooks([("blocks.1.loop.2.hook_mlp_out", put)]), pytest.raises(InputError, match=message):
        run(model, [measure], 5)
    assert hook_count(model) == 0


def test_broken_weights_of_a_layer_that_runs_once() -> None:
    model = make(**TINY["llama"])
    with torch.no_grad():
        model.transformer.coda[0].mlp.down.weight[0, 0] = math.nan
    with pytest.raises(
        InputError, match=r"prompt 0: .* from 'coda.0.hook_mlp_out' \(layer 0\) on. Look at the weights"
    ):
        run(model)


def test_a_feedforward_model_names_the_first_layer_that_was_read() -> None:
    model = make(**TINY["llama"])
    with torch.no_grad():
        model.transformer.blocks[1].mlp.down.weight[0, 0] = math.inf
    with pytest.raises(InputError, match=r"prompt 0: .* from 'blocks.2.hook_resid_post' \(layer 2\) on"):
        run(model.unrolled(), [NORM], None)


def test_scores_are_minus_infinity_where_nothing_is_seen() -> None:
    measure = Measure("top", "", "", "attn.hook_attn_scores", lambda x: x.amax(-1), axes=("head", "pos"))
    model = make(**TINY["llama"])
    assert bool(run(model, [measure])["top"].isfinite().all())
    with torch.no_grad():
        model.transformer.blocks[1].attn.q.weight[0, 0] = math.nan
    with pytest.raises(InputError, match=r"from 'blocks.1.loop.0.attn.hook_q' \(layer 1, loop 0\) on"):
        run(model, [measure])


# Files.


class Stops:
    """A measure's function that is interrupted at its n-th call."""

    def __init__(self, at: int):
        self.at, self.calls = at, 0

    def __call__(self, x: Tensor) -> Tensor:
        self.calls += 1
        if self.calls == self.at:
            raise KeyboardInterrupt
        return norm(x)


CALLS = 1 + 2 * 3 + 1  # of a layer in one forward of tiny("llama") with three loops


@pytest.mark.usefixtures("one_at_a_time")
@pytest.mark.parametrize("broken_in", [0, 1, 2, 3])
def test_an_interrupt_loses_nothing(tmp_path: Path, broken_in: int) -> None:
    """Five batches of one prompt each; the interrupt comes in the middle of one."""
    path, stops = tmp_path / "kept", Stops(broken_in * CALLS + 4)
    model, options = tiny("llama"), {"per_token": ["norm"], "batch_size": 1}

    def measures(function: Callable[..., Tensor]) -> list[Measure]:
        return [Measure("norm", "", "", RESID, function, axes=("pos",)), STEP]

    with pytest.raises(KeyboardInterrupt):
        run(model, measures(stops), save_to=path, **options)
    assert hook_count(model) == 0
    assert path.exists() == (broken_in > 0)
    if broken_in:
        partial_result = Observed.load(path)
        assert int(partial_result.done.sum()) == broken_in
        assert bool(partial_result["norm"].isnan().all(1).eq(~partial_result.done).all())
    goes_on = Stops(-1)
    result = run(model, measures(goes_on), save_to=path, **options)
    assert goes_on.calls == (5 - broken_in) * CALLS  # what was done is not done again
    whole = run(model, measures(Stops(-1)), **options)
    for name in ("norm", "step"):
        torch.testing.assert_close(result[name], whole[name], rtol=0, atol=0, equal_nan=True)
    for one, same in zip(result.per_token["norm"], whole.per_token["norm"], strict=True):
        torch.testing.assert_close(one, same, rtol=0, atol=0)
    kept = Observed.load(path)
    torch.testing.assert_close(kept["step"], whole["step"], rtol=0, atol=0, equal_nan=True)
    assert bool(kept.done.all()) and list(tmp_path.iterdir()) == [path]
    again = Stops(1)
    torch.testing.assert_close(run(model, measures(again), save_to=path, **options)["norm"], whole["norm"])
    assert again.calls == 0


def changed(model: LoopedModel) -> LoopedModel:
    """The same model but for one number."""
    with torch.no_grad():
        model.transformer.blocks[1].mlp.down.weight[3, 7] += 0.01
    return model


def share(threshold: float) -> Measure:
    return Measure("share", "", "", RESID, partial(share_above, threshold=threshold), axes=("pos",))


def closed(threshold: float) -> Measure:
    return Measure("share", "", "", RESID, lambda x: share_above(x, threshold), axes=("pos",))


POSITIONS = torch.arange(5).repeat(len(PROMPTS), 1)
SEEN = torch.ones(len(PROMPTS), 5, 5).tril()  # the short prompts' last places are seen, but not looked at
_OTHERS: list[tuple[Callable[[], dict[str, Any]], str]] = [
    (lambda: {"n_loops": 4}, "n_loops is 3 there, 4 here"),
    (lambda: {"seed": 1}, "initial_state is 'seed 0' there, 'seed 1' here"),
    (lambda: {"initial_state": torch.ones(5, 16)}, "initial_state is 'seed 0' there, 'given, "),
    (lambda: {"position_ids": POSITIONS + 1}, "position_ids is None there, 'given, "),
    (lambda: {"attention_mask": SEEN}, "attention_mask is None there, 'given, "),
    (lambda: {"model": changed(make(**TINY["huginn"]))}, "weights is '.*' there, '.*' here"),
    (lambda: {"model": make(**TINY["huginn"], model_name="other")}, "model is 'custom' there, 'other' here"),
    (lambda: {"prompts": PROMPTS[::-1]}, "prompts is '.*' there, '.*' here"),
    (lambda: {"measures": [NORM, share(0.2)]}, "the measures 'share' differ"),
    (lambda: {"measures": [NORM, closed(0.1)]}, "the measures 'share' differ"),
    (lambda: {"measures": [NORM]}, "the measures 'share' differ"),
    (lambda: {"measures": [NORM, share(0.1), STEP]}, "the measures 'step' differ"),
    (lambda: {"per_token": ["norm"]}, r"per_token is \(\) there, \('norm',\) here"),
]


@pytest.mark.parametrize(("other", "message"), _OTHERS, ids=[message[:30] for _, message in _OTHERS])
def test_a_file_of_another_call_is_refused(tmp_path: Path, other: Any, message: str) -> None:
    first: dict[str, Any] = {"model": make(**TINY["huginn"]), "measures": [NORM, share(0.1)]}
    run(**first, save_to=tmp_path / "kept")
    before = (tmp_path / "kept").read_bytes()
    with pytest.raises(InputError, match=f"was made by another call: {message}.*Give save_to another name"):
        run(**{**first, **other()}, save_to=tmp_path / "kept")
    assert (tmp_path / "kept").read_bytes() == before
    run(**first, save_to=tmp_path / "kept")  # the same call again is fine


def test_hooks_and_thresholds_held_by_functions_make_another_call(tmp_path: Path) -> None:
    model, path = tiny("huginn"), tmp_path / "kept"
    run(model, [closed(0.1)], save_to=path)
    with pytest.raises(InputError, match="the measures 'share' differ"):
        run(model, [closed(0.2)], save_to=path)
    message = r"hooks is \[\] there, \['blocks.1.hook_mlp_out, None: .*'\] here"
    ablation = ("blocks.1.hook_mlp_out", lambda x, hook: torch.zeros_like(x))
    with model.hooks([ablation]), pytest.raises(InputError, match=message):
        run(model, [closed(0.1)], save_to=path)


def test_a_file_that_is_no_result_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "notes").write_text("precious")
    with pytest.raises(InputError, match="can't be read as a result"):
        run(tiny("ouro"), save_to=tmp_path / "notes")
    assert (tmp_path / "notes").read_text() == "precious"


def test_what_was_done_before_an_error_is_kept(tmp_path: Path) -> None:
    model = make(tokenizer=word_tokenizer(), **TINY["llama"])
    breaks = ("blocks.0.loop.1.hook_mlp_out", lambda x, hook: x * math.inf if x.shape[1] == 5 else None)
    message = "prompt 1: activations are not finite, from 'blocks.0.loop.1.hook_mlp_out'"
    with model.hooks([breaks]), pytest.raises(InputError, match=message):
        run(model, save_to=tmp_path / "kept")
    assert Observed.load(tmp_path / "kept").done.tolist() == [True, False, True, True, True]
