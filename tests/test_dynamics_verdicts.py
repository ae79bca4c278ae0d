"""The verdict on trajectories that are known, its numbers against closed forms, and on models."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import helpers
import numpy as np
import pytest
import torch
from torch import Tensor
from trajectories import D_MODEL, KINDS, judge, states

from tl_looped import InputError
from tl_looped.dynamics import STEP, LongRun, long_run, long_run_of
from tl_looped.dynamics.modes import fit_modes
from tl_looped.dynamics.verdicts import VERDICTS, judge_states, sketch
from tl_looped.observe import observe


def one(trajectory: Tensor, **rule: float) -> dict[str, Any]:
    found = judge_states(trajectory[:, None], **rule)
    return {name: float(value) for name, value in found.items()} | {"word": VERDICTS[int(found["verdict"])]}


# Words.


@pytest.mark.parametrize(("n_loops", "noise"), [(32, 0.1), (96, 0.0), (96, 0.02)])
@pytest.mark.parametrize("kind", KINDS)
def test_no_word_is_wrong(kind: str, n_loops: int, noise: float):
    found = judge(kind, n_loops, noise, step=2)
    assert set(found) <= KINDS[kind][0] | {"undecided"}
    if noise == 0 and kind not in ("chaos", "drift of direction"):
        assert found["undecided"] <= 1  # an approach that has hardly begun, or part of a turn


def test_what_no_sum_of_modes_follows_is_left_undecided():
    """Random walks, noise with a memory, growth by a power: nothing is said of them, rather than a wrong word."""
    draws, times = torch.Generator().manual_seed(0), torch.arange(64, dtype=torch.float64)[:, None] + 1
    start = torch.eye(D_MODEL, dtype=torch.float64)[0]
    steps = torch.randn(64, D_MODEL, generator=draws, dtype=torch.float64) / 4
    lasting = [steps[0]]
    for step in steps[1:]:
        lasting.append(0.9 * lasting[-1] + step)
    made = [start + 0.2 * steps.cumsum(0), start + 0.1 * torch.stack(lasting), times.sqrt() * start]
    made += [3 * start + steps[0] / times.sqrt()]
    assert {VERDICTS[index] for index in judge_states(torch.stack(made, dim=1))["verdict"]} == {"undecided"}


def test_chaos_is_told_from_noise_and_from_what_repeats():
    henon = states(KINDS["chaos"][1]["Hénon map"], 256)
    assert one(henon)["word"] == "chaotic"
    noise = torch.randn(256, D_MODEL, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    assert one(torch.ones(D_MODEL, dtype=torch.float64) + noise)["word"] == "undecided"


@pytest.mark.parametrize("n_loops", [64, 128])
def test_words_and_rates_are_monotone_in_the_rate(n_loops: int):
    rates = [0.5, 0.7, 0.9, 0.95, 0.98, 0.99, 0.995]
    found = [one(states(lambda t, u, _, r=r: u[0] + 3 * r**t * u[1], n_loops)) for r in rates]
    words = [row["word"] for row in found]
    assert words == sorted(words, key=("rest", "approaching").index) and words[-1] == "approaching"
    moving = [(rate, row) for rate, row in zip(rates, found, strict=True) if row["word"] == "approaching"]
    assert [row["rate"] for _, row in moving] == pytest.approx([rate for rate, _ in moving], abs=1e-9)
    assert [row["way_left"] for _, row in moving] == sorted(row["way_left"] for _, row in moving)


# Numbers.


@pytest.mark.parametrize("noise", [0.0, 1e-4])
def test_an_approach_knows_its_rate_its_limit_and_its_time(noise: float):
    rate, n_loops = 0.98, 128
    row = one(states(lambda t, u, _: u[0] + 3 * rate**t * u[1], n_loops, noise))
    assert row["word"] == "approaching"
    assert abs(row["rate"] - rate) <= max(row["rate_error"], 1e-9)
    assert row["rate_error"] < 0.01
    window = 3 * rate ** torch.arange(n_loops // 4, n_loops, dtype=torch.float64)
    length = (1 + window.square()).mean().sqrt()
    left = float(window[-1] / length)
    assert row["way_left"] == pytest.approx(left, rel=1e-6 if noise == 0 else 0.05)
    assert row["loops_left"] == pytest.approx(math.log(0.01 / left) / math.log(rate), rel=1e-6 if noise == 0 else 0.05)


def test_an_orbit_knows_its_period_and_amplitude():
    row = one(states(lambda t, u, _: u[0] + 0.3 * ((2 * math.pi * t / 5).cos() * u[1]), 96))
    length = math.sqrt(1 + 0.3**2 / 2)
    assert (row["word"], row["period"]) == ("orbit", 5)
    assert row["amplitude"] == pytest.approx(0.3 / length, rel=0.01)
    assert math.isnan(row["rate"]) or row["way_left"] < 1e-9


def test_amplitudes_below_the_tolerance_are_rest_and_small_ones_above_are_not():
    for radius, tolerance, word in ((0.1, 0.01, "orbit"), (0.003, 0.01, "rest"), (0.003, 0.001, "orbit")):
        made = states(lambda t, u, _, radius=radius: u[0] + radius * ((2 * math.pi * t / 4).cos() * u[1]), 96)
        assert one(made, tolerance=tolerance)["word"] == word


def test_a_drift_says_what_changes():
    grows = judge_states(states(KINDS["drift of norm"][1]["0.1 a loop"], 64)[:, None])
    turns = judge_states(states(KINDS["drift of direction"][1]["0.003 radians a loop"], 64)[:, None])
    both = judge_states(states(KINDS["straight drift"][1]["speed 0.1"], 64)[:, None])
    made_by, places = {"tolerance": 0.01}, {"prompt": torch.zeros(3, dtype=torch.long), "pos": torch.arange(3)}
    found = LongRun(
        made_by=made_by, places=places, **{name: torch.cat([x[name] for x in (grows, turns, both)]) for name in grows}
    )
    assert found.drifts_in() == ["norm", "direction", "both"]
    assert float(grows["norm_change"]) == pytest.approx(math.log(7.3 / 2.6), rel=1e-6)  # loops 16 to 63
    assert float(turns["turn"]) == pytest.approx(47 * 0.003, rel=1e-6)
    assert found.shares()["drifting"] == 1.0 and found.prompt_shares()["drifting"] == 1.0


def test_a_slow_approach_hides_in_noise_and_is_not_called_rest():
    """At rest but for noise of 1 %, 32 loops can't exclude a contraction by 0.999; they can exclude one by 0.5."""
    made = states(KINDS["noise about a point"][1][""], 32, noise=0.003)
    assert one(made)["word"] == "undecided"
    assert one(made, tolerance=0.05, slowest=0.8)["word"] == "rest"
    assert one(states(KINDS["noise about a point"][1][""], 32))["word"] == "rest"


@pytest.mark.parametrize("rate", [1e-9, 1e-5, 1e-3])
def test_what_is_over_in_a_loop_or_two_rests(rate: float):
    times = torch.arange(256.0, dtype=torch.float64)[:, None]
    start, end = torch.randn(2, D_MODEL, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert one(end + start * rate**times)["word"] == "rest"
    noise = 1e-6 * torch.randn(256, D_MODEL, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    assert one(end + start * rate ** (times - 70).clamp(min=0) + noise)["word"] in ("rest", "undecided")


def test_zero_states_rest():
    row = one(torch.zeros(20, 4))
    assert (row["word"], row["way_left"], row["scatter"]) == ("rest", 0.0, 0.0)


@pytest.mark.parametrize("seed", range(3))
def test_modes_against_a_linear_map(seed: int):
    """x → Mx + b: the modes are the eigenvalues of M, each its own, and the way left is that to the fixed point."""
    random = np.random.default_rng(seed)
    basis = random.standard_normal((6, 6))
    turn = 0.9 * np.array([[math.cos(0.7), -math.sin(0.7)], [math.sin(0.7), math.cos(0.7)]])
    blocks = np.zeros((6, 6))
    blocks[:2, :2], blocks[2, 2], blocks[3, 3] = turn, 0.97, -0.85
    matrix, shift = basis @ blocks @ np.linalg.inv(basis), random.standard_normal(6)
    fixed, x, path = np.linalg.solve(np.eye(6) - matrix, shift), random.standard_normal(6), []
    for _ in range(20):
        x = matrix @ x + shift
        path.append(x)
    fit = fit_modes(np.stack(path), 1e-12)
    found = sorted((mode.radius, mode.turns) for mode in fit.modes)
    expected = sorted([(0.9, 0.7 / (2 * math.pi)), (0.97, 0.0), (0.85, 0.5)])
    assert np.array(found) == pytest.approx(np.array(expected), abs=1e-5)
    length = math.sqrt(np.square(path).sum(1).mean())
    slow = next(mode for mode in fit.modes if mode.radius > 0.95)
    along = np.linalg.solve(basis, path[-1] - fixed)[2] * basis[:, 2]  # column 2 is the eigenvector of 0.97
    assert slow.size == pytest.approx(np.linalg.norm(along) / length, rel=1e-4)


def test_errors_cover_the_truth_under_noise():
    """Four standard errors, over noise of 1 %: a truth outside once in ten thousand, so never in twenty."""
    for seed in range(20):
        made = states(lambda t, u, _: u[0] + 2 * 0.95**t * u[1], 64, 0.01, seed)[16:].numpy()
        slow = max(fit_modes(made, 1e-12).modes, key=lambda mode: mode.size)
        assert abs(slow.radius - 0.95) <= slow.radius_error


def test_a_sketch_keeps_lengths_on_average_and_whatever_is_linear():
    x = torch.randn(3, 5, 600, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    seen = sketch(x)
    assert seen.shape == (3, 32, 5)
    ratios = seen.norm(dim=1) / x.norm(dim=-1)
    assert float(ratios.mean()) == pytest.approx(1, abs=0.1) and float((ratios - 1).abs().max()) < 0.5
    torch.testing.assert_close(sketch(2 * x + x.flip(0)), 2 * seen + seen.flip(0))
    assert torch.equal(sketch(x[..., :7]), x[..., :7].transpose(1, 2))


# Errors.


@pytest.mark.parametrize(
    ("change", "rule", "message"),
    [
        (lambda x: x[:15], {}, "states has 15 loops, but this needs at least 16: pass a larger n_loops"),
        (lambda x: x / (x[3] - x[3]), {}, "states are not finite from loop 0, token 0 on"),
        (lambda x: x, {"tolerance": 0.0}, "tolerance must be a number above 0 and below 1, got 0.0"),
        (lambda x: x, {"slowest": 1.0}, "slowest must be a number above 0 and below 1, got 1.0"),
    ],
)
def test_bad_input(change: Any, rule: dict[str, float], message: str):
    made = states(KINDS["contraction"][1]["rate 0.9"], 20)[:, None]
    with pytest.raises(InputError, match=message):
        judge_states(change(made), **rule)


def test_a_model_is_refused_before_it_runs():
    model = helpers.tiny("ouro")
    with pytest.raises(InputError, match="n_loops must be at least 16, got 8"):
        long_run(model, [[1, 2]], 8)
    with pytest.raises(InputError, match="slowest must be a number above 0 and below 1, got 2.0"):
        long_run(model, [[1, 2]], 16, slowest=2.0)
    other = observe(model, [[1, 2]], 16, measures=[STEP], progress=False)
    with pytest.raises(InputError, match="'sketch' was not kept for every token"):
        long_run_of(other)


# Models.

PROMPTS = [[2, 5, 7], [3, 4, 9, 11, 6]]


@pytest.mark.parametrize("family", ["huginn", "ouro"])
def test_a_model_against_its_full_cache(family: str, tmp_path: Path):
    model = helpers.tiny(family)
    found = long_run(model, PROMPTS, 24, progress=False)
    column = 0
    for prompt in PROMPTS:
        _, cache = model.run_with_cache(torch.tensor([prompt]), 24)
        expected = judge_states(cache.stack("state_post")[:, 0])
        here = slice(column, column + len(prompt))
        assert torch.equal(found.verdict[here], expected["verdict"])
        column += len(prompt)
    table = found.to_dataframe()
    assert list(table.columns[:4]) == ["prompt", "pos", "verdict", "drifts_in"] and len(table) == 8
    assert LongRun.load(found.save(tmp_path / "kept")).to_dataframe().equals(table)
    bars = found.plot().data
    assert {trace.name for trace in bars} == set(table["verdict"])
    assert sum(trace.y[0] for trace in bars) == pytest.approx(100)


def test_a_model_whose_states_turn():
    """Without injection, and with layers that only rotate, a model is a rotation: back after 13 loops of two turns."""
    model = helpers.make(torch.float64, n_core=2, norm_placement="pre")
    with torch.no_grad():
        for block in model.transformer.blocks:
            block.attn.o.weight.zero_()
            block.mlp.down.weight.zero_()
    turn = 2 * math.pi * 2 / 13
    matrix = torch.block_diag(
        *[torch.tensor([[math.cos(turn), -math.sin(turn)], [math.sin(turn), math.cos(turn)]])] * 8
    )
    with model.hooks(fwd_hooks=[("hook_state_pre", lambda x, hook: x @ matrix.T.to(x))]):
        found = long_run(model, PROMPTS, 48, progress=False)
    assert found.shares()["orbit"] == 1.0
    assert found.period.tolist() == [13.0] * 8
