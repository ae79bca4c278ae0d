"""The paper's claims on a model: effects by slow computations, intervals, nulls, and what is said of them."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import make, word_tokenizer
from scipy.stats import spearmanr
from torch import Tensor

from tl_looped import InputError, LoopedModel
from tl_looped.__main__ import main
from tl_looped.attention import PATTERN_STEP, TOTAL_VARIATION
from tl_looped.claims import Evidence, paper_claims
from tl_looped.claims.evidence import (
    CLAIMS,
    _follows,
    _rank_correlation,
    _repeats,
    _resampled,
    _settles,
    verdict,
)
from tl_looped.dynamics import STEP, convergence
from tl_looped.engine.numbers import interval
from tl_looped.observe import observe
from tl_looped.stages import STAGE_MEASURES

CONFIG: dict[str, Any] = {"n_core": 3, "n_loops": 2, "injection": "concat_linear"}
BY_NAME = {claim.name: claim for claim in CLAIMS}


@pytest.fixture(scope="module")
def model() -> LoopedModel:
    return make(**CONFIG)


@pytest.fixture(scope="module")
def prompts(model: LoopedModel) -> Tensor:
    return torch.randint(model.cfg.d_vocab, (5, 7), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def found(model: LoopedModel, prompts: Tensor) -> Evidence:
    return paper_claims(model, prompts, 16, null_seeds=2, resamples=200, progress=False)


# Effects.


def test_every_claim_has_a_row_with_its_null(found: Evidence) -> None:
    table = found.to_dataframe().set_index("effect")
    assert list(table.index) == [claim.name for claim in CLAIMS if "baseline" not in claim.name]
    for name, values in found.effects.items():
        row = table.loc[name]
        assert len(values) == 5 and row["value"] == pytest.approx(float(values.nanmean()))
        assert row["low"] <= row["value"] <= row["high"] and row["null_low"] <= row["null"] <= row["null_high"]
    assert table.loc["stages_repeat", "verdict"] == "can't tell: too few layers (3, and 8 are needed)"


def test_the_null_is_the_same_config_with_random_weights(found: Evidence, model: LoopedModel, prompts: Tensor) -> None:
    values = []
    for seed in range(2):
        random = LoopedModel.from_config(model.cfg, seed=seed)
        of_one = paper_claims(random, prompts, 16, null_seeds=1, resamples=200, progress=False)
        values.append(float(of_one.effects["attention_follows_state"].mean()))
    (row,) = (row for row in found.rows if row["effect"] == "attention_follows_state")
    assert row["null"] == pytest.approx(np.mean(values)) and row["null_high"] == pytest.approx(max(values))


def test_effects_by_slow_computations(model: LoopedModel, prompts: Tensor, found: Evidence) -> None:
    seen = observe(model, prompts, 16, measures=[STEP, PATTERN_STEP, TOTAL_VARIATION, *STAGE_MEASURES], progress=False)
    state, pattern = (seen.prompts_by_loop(one.name)[:, 1:] for one in (STEP, PATTERN_STEP))
    pattern = pattern.mean(-1)
    for i in range(5):
        a, b = state[i].flatten().numpy(), pattern[i].flatten().numpy()
        assert float(_follows(seen)[i]) == pytest.approx(spearmanr(a, b).statistic, abs=1e-6)
        moved = seen.prompts_by_loop(TOTAL_VARIATION.name)[i].flatten(1).nanmean(1)
        late = [t for t in range(16) if float(moved[t]) > 0.05]
        assert float(_settles(seen, 0.05)[i]) == max(late, default=0)
        each = []
        for measure in STAGE_MEASURES:
            curves = seen.prompts_by_loop(measure.name)[i]
            curves = curves.mean(-1) if curves.ndim > 2 else curves
            each.append(np.corrcoef(curves[0].numpy(), curves[1].numpy())[0, 1])
        assert float(_repeats(seen, 2)[i]) == pytest.approx(np.nanmean(each), abs=1e-5)
    judged = convergence(model, prompts, 16, progress=False)
    rests = judged.converged[-1][judged.places["prompt"] == 3]
    assert float(found.effects["comes_to_rest"][3]) == pytest.approx(float(rests.double().nanmean()))
    losses = [model(prompts[3:4], loops, return_type="loss").item() for loops in (8, 2)]
    assert float(found.effects["loss_beyond_training"][3]) == pytest.approx(losses[0] - losses[1], abs=1e-4)


def test_a_baseline_is_compared_over_relative_depth(model: LoopedModel, prompts: Tensor) -> None:
    feedforward = make(n_core=5, n_loops=1, injection="none")
    found = paper_claims(model, prompts, 16, baseline=feedforward, null_seeds=1, resamples=100, progress=False)
    assert bool((found.effects["stages_are_the_baseline's"].abs() <= 1).all())
    again = paper_claims(
        model, iter(prompts.tolist()), 16, baseline=feedforward, null_seeds=1, resamples=100, progress=False
    )
    for name, values in found.effects.items():
        torch.testing.assert_close(again.effects[name], values, equal_nan=True)
    line = torch.tensor([[0.0, 1.0, 4.0]])
    torch.testing.assert_close(_resampled(line, 5), torch.tensor([[0.0, 0.5, 1.0, 2.5, 4.0]]).double())


# Intervals and verdicts.


def test_what_stands_still_in_both_is_a_tie_and_no_correlation() -> None:
    steps, patterns = torch.zeros(2, 1, 19)
    steps[0, 0], patterns[0, -1] = 1.0, 1.0
    # Two that are never large together. By places in the row, ties would be alike in both, and come out at 0.7.
    assert float(_rank_correlation(steps, patterns)[0]) == pytest.approx(-1 / 18)


def test_a_null_that_is_not_defined_decides_nothing(model: LoopedModel) -> None:
    row = {"low": 0.7, "high": 0.9, "null": np.nan, "null_low": np.nan, "null_high": np.nan}
    said = verdict(model, BY_NAME["attention_follows_state"], row, {})
    assert said == "holds, and with random weights the effect is not defined"


def test_intervals_hold_what_they_say() -> None:
    draws = np.random.default_rng(0)
    inside = 0
    for seed in range(200):
        low, high = interval(torch.tensor(draws.normal(1.0, 2.0, 24)), 400, seed)
        inside += low <= 1.0 <= high
    assert 0.88 <= inside / 200 <= 0.98  # percentiles of 24 numbers are a little narrow
    assert interval(torch.ones(5).double(), 100, 0) == (1.0, 1.0)


@pytest.mark.parametrize(
    ("name", "low", "high", "null", "words"),
    [
        ("attention_follows_state", 0.7, 0.9, (0.1, 0.3), "holds, and not with random weights"),
        ("attention_follows_state", 0.7, 0.9, (0.1, 0.8), "holds, but with random weights as well"),
        ("attention_follows_state", 0.4, 0.9, (0.1, 0.3), "can't tell: the interval reaches over the threshold"),
        ("attention_follows_state", 0.1, 0.4, (0.1, 0.3), "does not hold"),
        ("attention_settles_at", 1.0, 2.0, (5.0, 9.0), "holds, and not with random weights"),
        ("attention_settles_at", 1.0, 2.0, (1.5, 9.0), "holds, but with random weights as well"),
        ("attention_settles_at", 2.5, 4.0, (5.0, 9.0), "does not hold"),
        ("loss_beyond_training", -0.1, 0.05, (0.0, 0.0), "holds: states rest, and the loss is kept"),
        ("loss_beyond_training", 0.3, 0.5, (0.0, 0.0), "does not hold: states rest, and the loss grows"),
        ("comes_to_rest", 0.8, 0.9, (0.0, 0.0), "holds: the paper reports 'fixed point' of untrained models"),
        (
            "comes_to_rest",
            0.1,
            0.2,
            (0.0, 0.0),
            "does not hold: the paper reports 'fixed point' of",
        ),
    ],
)
def test_what_the_interval_supports(
    model: LoopedModel, name: str, low: float, high: float, null: tuple[float, float], words: str
) -> None:
    row = {"low": low, "high": high, "null": sum(null) / 2, "null_low": null[0], "null_high": null[1]}
    effects = {"comes_to_rest": torch.ones(4)}
    assert verdict(model, BY_NAME[name], row, effects).startswith(words)


# Calls.


def test_it_is_kept_shown_and_written(found: Evidence, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    again = Evidence.load(found.save(tmp_path / "found"))
    assert again.to_dataframe().equals(found.to_dataframe()) and set(again.effects) == set(found.effects)
    assert len(found.plot().data) == 2
    make(tokenizer=word_tokenizer(), **CONFIG).save_pretrained(tmp_path / "model")
    texts = ["a b c", "b c d", "c d a", "d a b"]
    options = ["--n-loops", "16", "--null-seeds", "1", "--out", str(tmp_path / "claims.csv")]
    assert main(["claims", str(tmp_path / "model"), "--prompts", *texts, *options]) == 0
    assert "attention_follows_state" in capsys.readouterr().out
    with open(tmp_path / "claims.csv", newline="") as file:
        assert len(list(csv.DictReader(file))) == 6
    (tmp_path / "texts.txt").write_text("\n".join(texts))
    assert main(["claims", str(tmp_path / "model"), "--prompts", str(tmp_path / "texts.txt"), *options]) == 0


@pytest.mark.usefixtures("as_a_user")
def test_what_can_not_be_told_is_refused(model: LoopedModel, prompts: Tensor) -> None:
    with pytest.raises(InputError, match="3 prompts are too few for an interval over prompts: give 4 or more"):
        paper_claims(model, prompts[:3], 16)
    with pytest.raises(InputError, match="n_loops must be at least 8, got 7"):
        paper_claims(model, prompts, 7)
    with pytest.raises(InputError, match="baseline loops 2 times: give the feedforward model beside it"):
        paper_claims(model, prompts, 16, baseline=model)
    part = make(n_loops=1, n_prelude=1, n_coda=1, n_core=2)
    with pytest.raises(InputError, match="baseline has only 2 of its 4 layers in the core, .* without loop_layers="):
        paper_claims(model, prompts, 16, baseline=part)
    closing = paper_claims(make(**CONFIG, loop_norm="each"), prompts, 16, null_seeds=1, resamples=100, progress=False)
    assert closing.rows[-1]["verdict"] == "can't tell: the paper has no 'pre' norms with loop_norm='each'"
    with pytest.raises(InputError, match="this model was trained with one: pass it as baseline="):
        paper_claims(make(n_loops=1), prompts, 16)
    with pytest.raises(
        InputError, match=r"in torch.bfloat16, in which states do not come closer .* dtype=torch.float32"
    ):
        paper_claims(make(torch.bfloat16, **CONFIG), prompts, 16)
    with pytest.raises(InputError, match="null_seeds must be at least 1, got 0"):
        paper_claims(model, prompts, 16, null_seeds=0)
