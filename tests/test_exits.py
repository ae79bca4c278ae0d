"""Exits: every rule against a full cache, what exits cost, and what is refused."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import pandas as pd
import pytest
import torch
from helpers import TINY, WORDS, hook_count, make, tiny, tokens_for, word_tokenizer
from torch import Tensor

from tl_looped import InputError, LoopedModel
from tl_looped.generation import LoopEnd
from tl_looped.lens import (
    AccelerationRule,
    EntropyRule,
    ExitTrace,
    GateRule,
    KLRule,
    LatentRule,
    StableTopRule,
    ThresholdRule,
    trace_exits,
)
from tl_looped.lens.trade_off import ExitCurves

every_family = pytest.mark.parametrize("family", TINY)
NAN = float("nan")
N_LOOPS = 5


# Every rule, from a full cache.


def slow_statistics(model: LoopedModel, tokens: Tensor, n_loops: int) -> dict[str, Tensor]:
    """Each rule's statistic after every loop at every position, [loop, batch, pos]."""
    with torch.no_grad():
        _, cache = model.run_with_cache(tokens, n_loops)
        entering, leaving = cache.stack("state_pre"), cache.stack("state_post")
        probs = torch.stack([model(tokens, t + 1).double().softmax(-1) for t in range(n_loops)])
    undefined = torch.full(tokens.shape, NAN, dtype=torch.float64)
    found: dict[str, list[Tensor]] = {name: [] for name in ("KL", "latent difference", "acceleration", "entropy")}
    found["stable top token"] = []
    steps = []
    for t in range(n_loops):
        length = leaving[t].double().norm(dim=-1)
        steps.append((leaving[t] - entering[t]).double())
        found["latent difference"].append(steps[t].norm(dim=-1) / length)
        found["entropy"].append(-(probs[t] * probs[t].log()).sum(-1))
        found["KL"].append((probs[t - 1] * (probs[t - 1] / probs[t]).log()).sum(-1) if t else undefined)
        found["acceleration"].append((steps[t] - steps[t - 1]).norm(dim=-1) / length if t else undefined)
        same = torch.ones_like(undefined)
        for earlier in range(t - 1, -1, -1):
            kept = probs[earlier : t + 1].argmax(-1)
            same = torch.where((kept == kept[-1]).all(0), t - earlier + 1.0, same)
        found["stable top token"].append(same)
    if model.cfg.exit_gate:
        gates = cache.stack("exit_gate").double().sigmoid()
        found["gate chance"] = list(gates)
        found["gate"] = [1 - (1 - gates[: t + 1]).prod(0) for t in range(n_loops)]
    return {name: torch.stack(values) for name, values in found.items()}


@lru_cache
def traced(family: str) -> ExitTrace:
    return trace_exits(tiny(family), tokens_for(tiny(family)), n_loops=N_LOOPS)


@every_family
def test_statistics_are_those_of_a_full_cache(family: str) -> None:
    model, trace = tiny(family), traced(family)
    tokens = tokens_for(model)
    wanted = slow_statistics(model, tokens, N_LOOPS)
    assert set(trace.rules) == set(wanted)
    for name, statistic in zip(trace.rules, trace.statistics, strict=True):
        slow = wanted[name].flatten(1)
        torch.testing.assert_close(statistic.double(), slow, equal_nan=True, atol=1e-5, rtol=1e-3, msg=name)
    assert trace.batch.tolist() == [0] * 5 + [1] * 5 and trace.pos.tolist() == [0, 1, 2, 3, 4] * 2
    assert hook_count(model) == 0


@every_family
def test_costs_are_those_of_a_run_that_stops(family: str) -> None:
    """KL to the whole run and agreement with it, read from runs of fewer loops, token by token."""
    model, trace = tiny(family), traced(family)
    tokens = tokens_for(model)
    with torch.no_grad():
        logs = torch.stack([model(tokens, t + 1).double().log_softmax(-1).flatten(0, 1) for t in range(N_LOOPS)])
    kl = (logs[-1].exp() * (logs[-1] - logs)).sum(-1)
    torch.testing.assert_close(trace.kl_to_final.double(), kl, atol=1e-5, rtol=1e-3)
    assert torch.equal(trace.same_top, logs.argmax(-1) == logs[-1].argmax(-1))
    statistics = dict(zip(trace.rules, trace.statistics, strict=True))
    rules = [KLRule(0.05), LatentRule(0.7), AccelerationRule(0.1), EntropyRule(2.5), StableTopRule(2)]
    for rule in [*rules, GateRule(0.7)] if model.cfg.exit_gate else rules:
        exits = []
        for token in range(10):
            values = statistics[rule.name][:, token].tolist()
            met = [v >= rule.threshold if rule.stops_above else v <= rule.threshold for v in values[:-1]]
            exits.append(met.index(True) if True in met else N_LOOPS - 1)
        assert trace.exit_loops(rule).tolist() == exits
        assert trace.cost(rule) == pytest.approx(
            {
                "saved": sum(N_LOOPS - 1 - t for t in exits) / 10,
                "kl": sum(float(kl[t, token]) for token, t in enumerate(exits)) / 10,
                "agreement": sum(bool(trace.same_top[t, token]) for token, t in enumerate(exits)) / 10,
            },
            abs=1e-5,
        )


@every_family
def test_a_judge_asked_loop_by_loop_says_the_same(family: str) -> None:
    """As in generation, where rows of tokens are judged while the model runs."""
    model, trace = tiny(family), traced(family)
    tokens = tokens_for(model)
    with torch.no_grad():
        _, cache = model.run_with_cache(tokens, N_LOOPS)
        for rule in (KLRule(0.05), LatentRule(0.7), AccelerationRule(0.1), EntropyRule(2.5), StableTopRule(2)):
            judge = rule.begin(model, N_LOOPS)
            stopped = torch.full((10,), N_LOOPS - 1)
            for t in range(N_LOOPS):
                after = cache["state_post", t]
                end = LoopEnd(
                    loop=t,
                    state=after.flatten(0, 1),
                    state_before=cache["state_pre", t].flatten(0, 1),
                    read=lambda after=after: model.readout(after, tokens).flatten(0, 1),
                )
                stopped = torch.where(judge(end) & (stopped == N_LOOPS - 1), t, stopped)
            assert torch.equal(stopped, trace.exit_loops(rule)), rule


@every_family
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_is_left_out_and_each_prompt_counts_as_alone(family: str, side: Any) -> None:
    model = make(tokenizer=word_tokenizer(), **{**TINY[family], "d_vocab": len(WORDS)})
    texts = ["a b c", "d"]
    both = trace_exits(model, texts, n_loops=3, padding_side=side)
    assert both.batch.tolist() == [0, 0, 0, 1] and both.pos.tolist() == [0, 1, 2, 2 if side == "left" else 0]
    alone = [trace_exits(model, text, n_loops=3) for text in texts]
    for name in ("statistics", "kl_to_final", "same_top"):
        wanted = torch.cat([getattr(one, name) for one in alone], dim=-1)
        torch.testing.assert_close(getattr(both, name), wanted, equal_nan=True, atol=1e-5, rtol=1e-3)


@every_family
@pytest.mark.parametrize("side", ["left", "right"])
def test_chosen_positions_and_small_batches_are_parts_of_the_whole(family: str, side: Any) -> None:
    model = make(tokenizer=word_tokenizer(), **{**TINY[family], "d_vocab": len(WORDS)})
    texts = ["a b c", "d", "e f"]
    whole = trace_exits(model, texts, n_loops=3, padding_side=side)
    for options in ({"batch_size": 2}, {"batch_size": 1, "positions": [-1, 1]}, {"positions": slice(1, None)}):
        part = trace_exits(model, texts, n_loops=3, padding_side=side, **options)
        positions = torch.arange(3)[options.get("positions", slice(None))]
        kept = torch.isin(whole.pos, positions)
        assert int(kept.sum()) > 0 and torch.equal(part.batch, whole.batch[kept])
        assert torch.equal(part.pos, whole.pos[kept])
        for name in ("statistics", "kl_to_final", "same_top"):
            wanted = getattr(whole, name)[..., kept]
            torch.testing.assert_close(getattr(part, name), wanted, equal_nan=True, atol=1e-5, rtol=1e-3)


def test_a_users_hooks_act_while_exits_are_traced() -> None:
    model = tiny("ouro")
    tokens = tokens_for(model)
    with model.hooks([("hook_state_post", lambda x, hook: x / 2)]):
        trace = trace_exits(model, tokens, n_loops=3)
        wanted = slow_statistics(model, tokens, 3)
    for name, statistic in zip(trace.rules, trace.statistics, strict=True):
        torch.testing.assert_close(statistic.double(), wanted[name].flatten(1), equal_nan=True, atol=1e-5, rtol=1e-3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_statistics_are_float32_at_least(dtype: torch.dtype) -> None:
    model = tiny("ouro", dtype)
    trace = trace_exits(model, tokens_for(model), n_loops=3)
    assert trace.statistics.dtype == trace.kl_to_final.dtype == torch.promote_types(dtype, torch.float32)
    gate = trace.statistics[trace.rules.index("gate")]
    assert bool((gate.diff(dim=0) >= 0).all()) and float(gate.max()) <= 1


# Curves.


def trace_of(statistic: list[list[float]], rule: type[ThresholdRule], kl: Any = None, same: Any = None) -> ExitTrace:
    """A trace of one rule with this statistic, [loop][token]."""
    values = torch.tensor(statistic)
    return ExitTrace(
        made_by={"model": "constructed"},
        rules=(rule.name,),
        n_loops=len(values),
        batch=torch.zeros(values.shape[1], dtype=torch.long),
        pos=torch.arange(values.shape[1]),
        statistics=values[None],
        kl_to_final=torch.zeros_like(values) if kl is None else torch.tensor(kl),
        same_top=torch.ones_like(values, dtype=torch.bool) if same is None else torch.tensor(same),
    )


def test_the_curve_of_a_constructed_trace() -> None:
    trace = trace_of(
        [[NAN, NAN], [0.3, 0.5], [0.1, 0.2], [0.0, 0.1]],
        KLRule,
        kl=[[4.0, 4.0], [2.0, 3.0], [1.0, 0.5], [0.0, 0.0]],
        same=[[False, False], [False, True], [True, True], [True, True]],
    )
    curve = trace.curves({"KL": [0.4, 0.15, 0.01]}).to_dataframe()
    wanted = pd.DataFrame(
        [("KL", "nats", 0.4, 1.5, 1.25, 0.5), ("KL", "nats", 0.15, 0.5, 0.5, 1.0), ("KL", "nats", 0.01, 0, 0, 1)],
        columns=["rule", "unit", "threshold", "saved", "kl", "agreement"],
    )
    pd.testing.assert_frame_equal(curve, wanted, check_dtype=False)
    assert trace.exit_loops(KLRule(0.4)).tolist() == [1, 2]


@every_family
def test_curves_are_costs_over_what_each_statistic_took(family: str) -> None:
    trace = traced(family)
    curves = trace.curves()
    table = curves.to_dataframe()
    assert (curves.n_loops, curves.n_tokens) == (N_LOOPS, 10)
    assert list(dict.fromkeys(table["rule"])) == list(trace.rules)
    classes = {rule.name: rule for rule in (KLRule, LatentRule, AccelerationRule, EntropyRule, StableTopRule)}
    for name, rule in (classes | {"gate": GateRule}).items():
        rows = table[table["rule"] == name].sort_values("threshold", ascending=not rule.stops_above)
        for row in rows.to_dict("records"):
            threshold = int(row["threshold"]) if rule is StableTopRule else row["threshold"]
            cost = {key: row[key] for key in ("saved", "kl", "agreement")}
            assert cost == pytest.approx(trace.cost(rule(threshold)), abs=1e-6)
        if len(rows):  # a looser threshold saves more, up to all that the rule can save
            assert rows["saved"].is_monotonic_increasing
            possible = N_LOOPS - 1 if rule in (LatentRule, EntropyRule, GateRule) else N_LOOPS - 2
            assert rule in (StableTopRule, GateRule) or rows["saved"].iloc[-1] == pytest.approx(possible)
            assert set(rows["unit"]) == {rule.unit}
    assert ("gate" in set(table["rule"])) == (family == "ouro")
    assert set(table.loc[table["rule"] == "stable top token", "threshold"]) == {2, 3, 4, 5}


def test_a_statistic_of_zero_still_gives_a_point() -> None:
    """A model that has come to rest stops at the first chance."""
    curve = trace_of([[NAN] * 2, [0.0, 0.0], [0.0, 0.0]], KLRule).curves().to_dataframe()
    assert len(curve) == 1
    assert curve["saved"].tolist() == [1.0] and 0 < curve["threshold"][0] < 1e-20


def test_a_rule_that_is_not_defined_in_time_has_no_point() -> None:
    curve = trace_of([[NAN] * 2, [0.3, 0.1]], KLRule).curves()
    assert curve.rules == () and len(curve.to_dataframe()) == 0


def test_a_gate_that_is_shut_or_open_has_a_curve() -> None:
    shut = trace_of([[0.0, 0.0], [0.0, 0.0], [0.0, 0.0]], GateRule)
    assert shut.curves({"gate": [0.5]}).saved.tolist() == [0.0]
    assert all(0 < threshold <= 1 for threshold in shut.curves().threshold.tolist())
    opened = trace_of([[1.0, 1.0], [1.0, 1.0], [1.0, 1.0]], GateRule)
    assert opened.curves().saved.tolist() == [2.0]


def test_the_point_that_saves_most_at_a_price() -> None:
    points = [
        ("KL", 0.1, 1.0, 0.3, 1.0), ("KL", 0.2, 2.0, 0.2, 0.99),
        ("KL", 0.3, 2.0, 0.1, 0.99), ("KL", 0.4, 3.0, 0.4, 0.9),
        ("entropy", 1.0, 2.5, 0.5, 0.995), ("gate", 0.5, 3.0, 0.9, 0.5), ("stable top token", 2.0, 0.0, 0.0, 1.0),
    ]  # fmt: skip
    rules, *columns = zip(*points, strict=True)
    names = ("threshold", "saved", "kl", "agreement")
    values = {name: torch.tensor(column, dtype=torch.float64) for name, column in zip(names, columns, strict=True)}
    curves = ExitCurves(made_by={}, n_loops=4, n_tokens=100, rules=rules, **values)
    best = curves.most_saved()
    assert best[["rule", "threshold", "saved"]].values.tolist() == [["entropy", 1.0, 2.5], ["KL", 0.3, 2.0]]
    assert curves.most_saved(0.5)["rule"].tolist() == ["KL", "gate", "entropy"]
    assert curves.most_saved(1.0)[["rule", "threshold"]].values.tolist() == [["KL", 0.1]]
    for wrong in (0.0, 1.01, NAN):
        with pytest.raises(InputError, match="agreement must be a number above 0 and at most 1, got"):
            curves.most_saved(wrong)


def test_a_share_of_tokens_is_not_rounded_below_itself() -> None:
    same = [[True] * 19 + [False], [True] * 20]
    trace = trace_of([[0.5] * 20, [0.5] * 20], EntropyRule, kl=[[0.0] * 20] * 2, same=same)
    assert trace.curves({"entropy": [1.0]}).most_saved(0.95)["saved"].tolist() == [1.0]


def test_the_figure_has_all_rules_in_two_panels() -> None:
    curves = traced("ouro").curves()
    lines = curves.plot().to_dict()["data"]
    table = curves.to_dataframe()
    names = list(dict.fromkeys(table["rule"]))
    assert [line["name"] for line in lines] == [name for name in names for _ in range(2)]
    for name, agreement, kl in zip(names, lines[::2], lines[1::2], strict=True):
        rows = table[table["rule"] == name].sort_values(["saved", "threshold"])
        assert list(agreement["x"]) == list(kl["x"]) == rows["saved"].tolist()
        assert list(agreement["y"]) == rows["agreement"].tolist()
        assert list(kl["y"]) == rows["kl"].tolist()


def test_the_table_of_a_trace() -> None:
    trace = traced("ouro")
    table = trace.to_dataframe()
    assert len(table) == N_LOOPS * 10
    for loop, token in ((0, 0), (2, 7), (4, 9)):
        where = (table["loop"] == loop) & (table["batch"] == token // 5) & (table["pos"] == token % 5)
        (row,) = table[where].to_dict("records")
        assert row["kl_to_final"] == pytest.approx(float(trace.kl_to_final[loop, token]))
        assert row["same_top"] == bool(trace.same_top[loop, token])
        for name, statistic in zip(trace.rules, trace.statistics, strict=True):
            assert row[name] == pytest.approx(float(statistic[loop, token]), nan_ok=True)


# Rules of one's own.


class LengthRule(ThresholdRule):
    """Stop where the state is long."""

    name = "length"
    unit = "L2"
    stops_above = True

    @classmethod
    def statistic(cls, end: LoopEnd, memory: Any) -> Tensor:
        """The norm of the state."""
        return end.state.norm(dim=-1)


def test_a_rule_of_ones_own_can_be_traced() -> None:
    model = tiny("llama")
    tokens = tokens_for(model)
    trace = trace_exits(model, tokens, n_loops=3, rules=[LengthRule, KLRule])
    _, cache = model.run_with_cache(tokens, 3)
    length = cache.stack("state_post").norm(dim=-1).flatten(1)
    torch.testing.assert_close(trace.statistics[0], length)
    middle = float(length.median())
    met = torch.cat(((length >= middle)[:-1], torch.ones(1, 10, dtype=torch.bool)))
    assert torch.equal(trace.exit_loops(LengthRule(middle)), met.int().argmax(0))
    with pytest.raises(InputError, match=r"curves are drawn for .*of 'length', ask cost\(rule\) for each threshold"):
        trace.curves()


# What is refused.


@pytest.mark.parametrize(
    ("rule", "threshold", "message"),
    [
        (
            GateRule,
            1.5,
            r"gate: the threshold .cumulative .* must be a number above 0 and at most 1, got 1.5",
        ),
        (
            GateRule,
            0.0,
            "gate: the threshold .cumulative .* must be a number above 0 and at most 1, got 0.0",
        ),
        (KLRule, -0.1, "KL: the threshold .nats. must be a finite number above 0, got -0.1"),
        (KLRule, float("inf"), "KL: the threshold .nats. must be a finite number above 0, got inf"),
        (LatentRule, NAN, "latent difference: the threshold .relative L2. must be a finite number above 0, got nan"),
        (AccelerationRule, 0.0, "acceleration: the threshold .relative L2. must be a finite number above 0"),
        (EntropyRule, True, "entropy: the threshold .nats. must be a finite number above 0, got True"),
        (EntropyRule, "low", "entropy: the threshold .nats. must be a finite number above 0, got 'low'"),
        (StableTopRule, 1, "stable top token: the number of loops must be at least 2, got 1"),
        (StableTopRule, 2.5, "stable top token: the number of loops must be an integer, got 2.5"),
    ],
)
@pytest.mark.usefixtures("as_a_user")
def test_thresholds_out_of_range(rule: type[ThresholdRule], threshold: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        rule(threshold)
    if rule is not StableTopRule:  # in a curve too
        with pytest.raises(InputError, match=message):
            trace_of([[0.5], [0.5]], rule).curves({rule.name: [0.5, threshold]})


@pytest.mark.parametrize("family", ["huginn", "llama", "olmo2", "added"])
def test_a_gate_where_there_is_none(family: str) -> None:
    model = tiny(family)
    message = "custom has no exit gate, so GateRule can't judge it: use KLRule, LatentRule, StableTopRule, EntropyRule"
    with pytest.raises(InputError, match=message):
        trace_exits(model, tokens_for(model), rules=[KLRule, GateRule])
    with pytest.raises(InputError, match=message):
        GateRule(0.5).begin(model, 4)
    assert GateRule.name not in trace_exits(model, tokens_for(model)).rules


def test_a_rule_that_was_not_traced() -> None:
    trace = trace_of([[0.5], [0.5]], KLRule)
    message = r"this trace has the rules \['KL'\], not 'entropy': trace that rule too"
    for call in (trace.exit_loops, trace.cost):
        with pytest.raises(InputError, match=message):
            call(EntropyRule(1.0))
    with pytest.raises(InputError, match=message):
        trace.curves({"entropy": [1.0]})


@pytest.mark.usefixtures("as_a_user")
def test_one_threshold_is_no_list() -> None:
    one: Any = 0.5
    with pytest.raises(InputError, match=r"thresholds of 'KL' must be a list, such as \[0.5\], got 0.5"):
        trace_of([[0.5], [0.5]], KLRule).curves({"KL": one})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n_loops": 1}, "exits need whole runs of at least two loops: .* got n_loops=1"),
        ({"stop_at_loop": 1}, "trace_exits has no argument 'stop_at_loop'"),
        ({"positions": 5}, r"position 5 is out of range: 5 exist"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"rules": []}, "rules is empty: leave it out for all rules"),
        ({"rules": [KLRule(0.1)]}, r"rules are classes of rules, such as KLRule, got KLRule\(threshold=0.1\)"),
        ({"rules": [ThresholdRule]}, "rules are classes of rules"),
        ({"rules": ["KL"]}, "rules are classes of rules, such as KLRule, got 'KL'"),
        ({"rules": KLRule}, r"rules must be a list of classes of rules, such as \[KLRule\], got <class"),
    ],
)
@pytest.mark.usefixtures("as_a_user")
def test_calls_that_can_not_be_traced(options: dict[str, Any], message: str) -> None:
    model = tiny("ouro")
    ran: list[str] = []
    with model.hooks([("hook_embed", lambda x, hook: ran.append(hook.name))]), pytest.raises(InputError, match=message):
        trace_exits(model, tokens_for(model), **{"n_loops": 3, **options})
    assert ran == []
