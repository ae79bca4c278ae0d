"""Probes: right where the answer is known, at chance where there is nothing to read, and what they say of a model."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import tiny
from torch import Tensor

from tl_looped import LoopedModel
from tl_looped.record import Probed, Recorded, probe, record
from tl_looped.training.variable_chains import draw_contexts, solve

pytest.importorskip("sklearn", reason="scikit-learn is not installed: pip install '.[probes]'")


def planted(folder: Path, signal: dict[int, float], prompts: int = 60, pos: int = 2) -> tuple[Recorded, list[str]]:
    """A record of noise to which each prompt's class is added in some loops; tokens say nothing of the class."""
    model, generator = tiny("llama"), torch.Generator().manual_seed(0)
    tokens = torch.randint(20, (prompts, pos), generator=generator)
    tokens[:, 0], tokens[:, 1] = torch.arange(prompts) % 20, torch.arange(prompts) // 20  # no two prompts alike
    labels = [i % 2 for i in range(prompts)]
    side = 2.0 * torch.tensor(labels)[:, None] - 1

    def plant(x: Tensor, hook: Any) -> Tensor:
        noise = torch.randn(x.shape, generator=generator)
        noise[:, :, 0] += signal.get(hook.loop, 0.0) * side[: len(x)]
        return noise

    with model.hooks(fwd_hooks=[("hook_state_post", plant)]):
        recorded = record(model, tokens, 3, sites="state_post", out=folder, batch_size=prompts, progress=False)
    return recorded, ["left" if one else "right" for one in labels]


def test_a_planted_signal_is_found_where_it_is(tmp_path: Path) -> None:
    recorded, labels = planted(tmp_path / "r", {1: 8.0, 2: -8.0})
    found = probe(recorded, labels)
    assert found.classes == ("left", "right") and found.loops == (0, 1, 2) and found.layers == (-1,)
    assert found.accuracy[1:].flatten().tolist() == [1.0, 1.0]
    assert abs(float(found.accuracy[0]) - 0.5) < 0.15 and bool((found.low[0] < 0.5).all())
    assert bool((found.low <= found.accuracy).all()) and bool((found.accuracy <= found.high + 1e-12).all())
    assert 0.9 < float(found.low[1]) < 1.0  # of 60 prompts, not of 120 rows: 1 / (1 + 1.96² / 60)
    assert float(found.low[1]) == pytest.approx(1 / (1 + 1.959964**2 / 60), 1e-5)
    assert found.examples.flatten().tolist() == [120] * 3 and found.prompts.flatten().tolist() == [60] * 3
    assert float(found.chance[1]) <= 0.5
    truth = torch.tensor([found.classes.index(one) for one in labels]).repeat_interleave(2)
    assert torch.equal(found.predicted[1, 0, 0], truth)


def test_a_shared_probe_reads_what_all_loops_write_alike(tmp_path: Path) -> None:
    alike, labels = planted(tmp_path / "alike", {0: 8.0, 1: 8.0, 2: 8.0})
    assert probe(alike, labels, by=["layer"]).accuracy.flatten().tolist() == [1.0] * 3
    turned, labels = planted(tmp_path / "turned", {0: 8.0, 1: 8.0, 2: -8.0})
    assert probe(turned, labels).accuracy.flatten().tolist() == [1.0] * 3
    shared = probe(turned, labels, by=["layer"])
    assert float(shared.accuracy[:2].min()) > 0.85 and float(shared.accuracy[2]) < 0.15


def test_the_control_task_is_learnt_by_heart_where_the_token_can_be_read(tmp_path: Path) -> None:
    model, rng = tiny("llama"), np.random.default_rng(0)
    tokens = torch.from_numpy(rng.integers(0, 6, (80, 3)))
    recorded = record(model, tokens, 1, sites="embed", out=tmp_path / "r", progress=False)
    labels = rng.integers(0, 2, 80)
    found = probe(recorded, labels)
    assert found.loops == (-1,) and float(found.control) == 1.0 and abs(float(found.accuracy) - 0.5) < 0.2
    assert float(found.selectivity) == float(found.accuracy) - 1.0
    fresh = probe(recorded, labels, types=list(range(240)))  # a type for every row: nothing to learn by heart
    assert abs(float(fresh.control) - 0.5) < 0.15


def test_one_probe_a_position_and_labels_by_row(tmp_path: Path) -> None:
    recorded, _ = planted(tmp_path / "r", {}, pos=3)
    labels = recorded.rows.pos.to_numpy() == 1
    by_row = probe(recorded, labels, folds=2)
    assert by_row.positions == (-1,)
    recorded, labels = planted(tmp_path / "s", {1: 8.0}, pos=3)
    found = probe(recorded, labels, by=("loop", "pos"))
    assert found.positions == (0, 1, 2) and found.accuracy[1, 0].tolist() == [1.0] * 3
    assert found.examples[1, 0].tolist() == [60] * 3
    table = found.to_dataframe()
    assert table.pos.tolist() == [0, 1, 2] * 3 and table.layer.isna().all() and (table.accuracy[3:6] == 1).all()
    assert len(found.plot(pos=2).data) == 3
    with pytest.raises(ValueError, match=r"at the positions \[0, 1, 2\]: say which"):
        found.plot()
    assert torch.equal(Probed.load(found.save(tmp_path / "p")).accuracy, found.accuracy)


@pytest.mark.usefixtures("as_a_user")
def test_wrong_labels_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recorded, labels = planted(tmp_path / "r", {})
    for call, message in [
        (lambda: probe(recorded, labels[:-1]), "59 labels for 60 prompts and 120 rows: give one for each"),
        (lambda: probe(recorded, ["same"] * 60), "all labels are 'same'"),
        (
            lambda: probe(recorded, ["rare", *labels[1:]]),
            "the class 'rare' is in 1 prompt, .*or leave it out",
        ),
        (lambda: probe(recorded, ["few"] * 3 + labels[3:]), "the class 'few' is in 3 prompts, .*pass folds=3"),
        (lambda: probe(recorded, [0.5] * 60), "must be classes, and some are real numbers"),
        (lambda: probe(recorded, labels, by=["loops"]), "by must name some of .* got 'loops'. Nearest: 'loop'"),
        (lambda: probe(recorded, labels, folds=1), "folds must be at least 2"),
        (lambda: probe(recorded, labels, site="embed"), "the site 'embed' was not recorded"),
    ]:
        with pytest.raises(ValueError, match=message):
            call()
    monkeypatch.setitem(sys.modules, "sklearn.model_selection", None)
    with pytest.raises(ValueError, match=r"probes need scikit-learn: pip install 'tl_looped\[probes\]'"):
        probe(recorded, labels)


def test_the_query_of_looped_hops_goes_down_its_chain(tmp_path: Path) -> None:
    from sklearn.linear_model import RidgeClassifier

    model, rng = LoopedModel.from_pretrained("looped-hops"), np.random.default_rng(0)
    contexts = draw_contexts(rng, 700, 7, 4, True)
    prompts = [contexts.text(row, int(np.flatnonzero(contexts.hops[row] == 4)[0])) for row in range(700)]
    solved = [solve(prompt) for prompt in prompts]
    recorded = record(
        model, prompts, sites="state_post", positions="last", out=tmp_path / "r", batch_size=128, progress=False
    )

    def by_loop(labels: list[str], **options: Any) -> Any:
        return probe(recorded, labels, folds=3, estimator=RidgeClassifier(), **options)

    second, third = ([path[steps] for _, path in solved] for steps in (2, 3))
    second, third, answer = (by_loop(labels) for labels in (second, third, [digit for digit, _ in solved]))
    # In loop t the query has the variable that is t + 1 steps down, and from the third loop on the digit.
    assert float(second.accuracy[1]) > 0.9 and float(second.high[0]) < 0.15
    assert float(third.accuracy[2]) > 0.9 and float(third.high[1]) < 0.15
    assert float(answer.low[3:].min()) > 0.9 and float(answer.high[:3].max()) < 0.2
    shuffled = [solved[i][1][3] for i in rng.permutation(700)]
    assert float(by_loop(shuffled).accuracy.max()) < 0.12  # the null: no label of another prompt can be read
    assert float(by_loop([p[3] for _, p in solved], by=["layer"]).accuracy[2]) < float(third.accuracy[2])
