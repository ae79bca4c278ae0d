"""What early exits save and what they cost on a set of prompts, over a range of thresholds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import pandas as pd
import plotly.graph_objects as go
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tl_looped.engine.checks import check_eval, check_number
from tl_looped.engine.errors import InputError, check_count
from tl_looped.engine.hooks import LoopHookPoint
from tl_looped.engine.numbers import first_met
from tl_looped.engine.results import Result
from tl_looped.engine.runs import Run
from tl_looped.generation import LoopEnd
from tl_looped.lens.exits import (
    AccelerationRule,
    EntropyRule,
    GateRule,
    KLRule,
    LatentRule,
    Meter,
    StableTopRule,
    ThresholdRule,
)
from tl_looped.lens.measures import kl_divergence, log_probs_of
from tl_looped.lens.reads import Positions, choose_reads
from tl_looped.model import LoopedModel, check_looped
from tl_looped.viz.exits import exit_curves

RULES: dict[str, type[ThresholdRule]] = {
    rule.name: rule for rule in (GateRule, KLRule, LatentRule, AccelerationRule, EntropyRule, StableTopRule)
}
_THRESHOLDS = 24  # how many a curve has
_LEAST = 1e-30  # as a threshold: one is above 0, a statistic may be 0


@dataclass(frozen=True, eq=False, repr=False)
class ExitTrace(Result):
    """How exit rules see one run: their statistics after every loop, and what stopping there would cost.

    Every token judged is a row: all real ones, unless some positions were asked for. A token that stops is read out as
    in a run that stops everywhere after that loop: a coda sees the other tokens at the same loop. (While text is
    generated, they may have stopped at others.)

    Attributes:
        rules: names of the rules.
        n_loops: loops of the run.
        batch, pos: where each row is.
        statistics: of each rule after each loop; NaN where it is not defined yet.
        kl_to_final: KL(read-out of the last loop ‖ read-out of the loop), in nats.
        same_top: whether the loop's top token is that of the last loop.
    """

    rules: tuple[str, ...]
    n_loops: int
    batch: Int[Tensor, " rows"]
    pos: Int[Tensor, " rows"]
    statistics: Float[Tensor, "rule loop rows"]
    kl_to_final: Float[Tensor, "loop rows"]
    same_top: Bool[Tensor, "loop rows"]

    def exit_loops(self, rule: ThresholdRule) -> Int[Tensor, " rows"]:
        """The loop after which each token stops: the first at which the rule is met, else the last.

        Raises:
            InputError: the rule was not traced.
        """
        met = rule.met(self.statistics[self._index(rule.name)])
        return first_met(met).nan_to_num(self.n_loops - 1).long()

    def cost(self, rule: ThresholdRule) -> dict[str, float]:
        """Means over tokens: "saved" (loops not run), "kl" (to the full run, nats), "agreement" (same top token)."""
        exits = self.exit_loops(rule)
        return {
            "saved": float((self.n_loops - 1 - exits).double().mean()),
            "kl": float(self.kl_to_final.gather(0, exits[None]).double().mean()),
            "agreement": float(self.same_top.gather(0, exits[None]).double().mean()),
        }

    def curves(self, thresholds: Mapping[str, Sequence[int | float]] | None = None) -> ExitCurves:
        """What each rule saves and costs over a range of thresholds.

        Args:
            thresholds: of some rules, by name; for the others, values spread evenly over what the statistic took. A
                rule whose statistic is not defined before the last loop has no point.

        Raises:
            InputError: a rule that was not traced, or a threshold out of its range.
        """
        given = thresholds or {}
        for name, values in given.items():
            self._index(name)
            if isinstance(values, (str, int, float)):
                raise InputError(f"thresholds of {name!r} must be a list, such as [{values!r}], got {values!r}.")
        for name in self.rules:
            if name not in RULES:
                raise InputError(f"curves are drawn for {list(RULES)}; of {name!r}, ask cost(rule) for each threshold.")
        rules = [RULES[name](value) for name in self.rules for value in given.get(name, self._spread(name))]
        costs = [self.cost(rule) for rule in rules]
        # In float64: 19 of 20 tokens must not be less than 0.95.
        columns = {
            name: torch.tensor([cost[name] for cost in costs], dtype=torch.float64)
            for name in ("saved", "kl", "agreement")
        }
        return ExitCurves(
            made_by=self.made_by,
            n_loops=self.n_loops,
            n_tokens=len(self.pos),
            rules=tuple(rule.name for rule in rules),
            threshold=torch.tensor([float(rule.threshold) for rule in rules], dtype=torch.float64),
            **columns,
        )

    def to_dataframe(self) -> pd.DataFrame:
        """One row for each token and loop: batch, pos, loop, kl_to_final, same_top, and each rule's statistic."""
        loops, rows = torch.cartesian_prod(torch.arange(self.n_loops), torch.arange(len(self.pos))).unbind(-1)
        frame = {"batch": self.batch[rows], "pos": self.pos[rows], "loop": loops}
        frame |= {"kl_to_final": self.kl_to_final.flatten(), "same_top": self.same_top.flatten()}
        frame |= {name: self.statistics[i].flatten() for i, name in enumerate(self.rules)}
        return pd.DataFrame({name: column.numpy() for name, column in frame.items()})

    def plot(self) -> go.Figure:
        """What each rule saves and costs; see `ExitCurves.plot`."""
        return self.curves().plot()

    def _index(self, name: str) -> int:
        if name not in self.rules:
            raise InputError(f"this trace has the rules {list(self.rules)}, not {name!r}: trace that rule too.")
        return self.rules.index(name)

    def _spread(self, name: str) -> list[int] | list[float]:
        """Thresholds at which exits change: quantiles of the statistic; whole numbers where it counts loops."""
        if name == StableTopRule.name:
            return list(range(2, self.n_loops + 1))
        values = self.statistics[self._index(name)][:-1].double()
        values = values[values.isfinite()].clamp(min=_LEAST).sort().values
        places = torch.linspace(0, len(values) - 1, min(_THRESHOLDS, len(values)), dtype=torch.float64).round().long()
        return sorted(set(values[places].tolist()))


@dataclass(frozen=True, eq=False, repr=False)
class ExitCurves(Result):
    """Loops saved against what that costs, one point for each rule and threshold; means over `n_tokens` tokens.

    Attributes:
        n_loops: loops of the full run.
        n_tokens: how many tokens were judged.
        rules: the rule of each point.
        threshold: in the unit of its rule.
        saved: loops not run.
        kl: KL(full run ‖ read-out at the exit), in nats.
        agreement: share of tokens whose top token is that of the full run.
    """

    n_loops: int
    n_tokens: int
    rules: tuple[str, ...]
    threshold: Float[Tensor, " point"]
    saved: Float[Tensor, " point"]
    kl: Float[Tensor, " point"]
    agreement: Float[Tensor, " point"]

    def to_dataframe(self) -> pd.DataFrame:
        """One row for each point: rule, unit, threshold, saved, kl, agreement."""
        units = [RULES[name].unit for name in self.rules]
        columns = {name: getattr(self, name).numpy() for name in ("threshold", "saved", "kl", "agreement")}
        return pd.DataFrame({"rule": self.rules, "unit": units, **columns})

    def most_saved(self, agreement: float = 0.99) -> pd.DataFrame:
        """Of each rule the point that saves most while enough tokens keep their top token, the best rule first.

        A rule that saves nothing at that price is left out. Of points that save the same, the one of the lowest KL.

        Args:
            agreement: the least share of tokens with the full run's top token.

        Raises:
            InputError: a share outside (0, 1].
        """
        check_number("agreement", agreement, 0.0, 1.0, high_too=True)
        points = self.to_dataframe()
        points = points.loc[(points["agreement"] >= agreement) & (points["saved"] > 0)]
        points = points.sort_values(["saved", "kl"], ascending=[False, True], kind="stable")
        return points.drop_duplicates("rule").reset_index(drop=True)

    def plot(self) -> go.Figure:
        """All rules in one figure: KL and agreement over the loops saved."""
        return exit_curves(self.to_dataframe(), self.n_loops)


@torch.no_grad()
def trace_exits(
    model: LoopedModel,
    input: str | list[str] | Tensor,
    rules: Sequence[type[ThresholdRule]] | None = None,
    n_loops: int | None = None,
    *,
    positions: Positions = None,
    batch_size: int | None = None,
    **options: Any,
) -> ExitTrace:
    """Run twice, first for what the whole run says, and note what every exit rule sees after every loop.

    Args:
        model: the model.
        input: text, texts, or token ids; padding is left out.
        rules: classes of rules; None for all that the model can have.
        n_loops: loops of the full run.
        positions: which to judge, as in `loop_lens`; all by default.
        batch_size: most prompts to run at once. Log probabilities of two loops and of the whole run are held for all
            positions judged of so many prompts. None for all prompts.
        options: as in `LoopedModel.forward`.

    Raises:
        InputError: fewer than two loops, no rule, a rule that the model can't have, or a position that there is not.
    """
    check_eval(check_looped(model))
    run = model.batch(input, n_loops, **options)
    if run.n_loops < 2 or run.start or not run.reads_out:
        raise InputError(f"exits need a whole run of at least two loops, got n_loops={run.n_loops}.")
    reads = choose_reads(model, run, "state", None, None, positions)
    chosen = _checked(model, rules)
    n_prompts = len(run.tokens)
    size = n_prompts if batch_size is None else check_count("batch_size", batch_size)
    judged = torch.zeros_like(run.attention_mask)
    judged[:, list(reads.positions)] = True
    judged &= run.attention_mask
    parts = [slice(begin, begin + size) for begin in range(0, n_prompts, size)]
    tracers = [_Tracer(model, _rows(run, part), judged[part], [rule.meter() for rule in chosen]) for part in parts]
    for tracer in tracers:
        tracer.trace()
    batch, pos = judged.nonzero().cpu().unbind(-1)
    return ExitTrace(
        made_by={"model": model.cfg.model_name, **run.describe()},
        rules=tuple(rule.name for rule in chosen),
        n_loops=run.n_loops,
        batch=batch,
        pos=pos,
        statistics=torch.cat([torch.stack(tracer.statistics, dim=1) for tracer in tracers], dim=-1),
        kl_to_final=torch.cat([torch.stack(tracer.kl) for tracer in tracers], dim=-1),
        same_top=torch.cat([torch.stack(tracer.same) for tracer in tracers], dim=-1),
    )


def _checked(model: LoopedModel, rules: Sequence[type[ThresholdRule]] | None) -> list[type[ThresholdRule]]:
    if rules is None:
        rules = [rule for rule in RULES.values() if rule is not GateRule or model.transformer.exit_logit]
    if not isinstance(rules, Sequence):
        raise InputError(f"rules must be a list of classes of rules, such as [KLRule], got {rules!r}.")
    if not rules:
        raise InputError("rules is empty: leave it out for all rules.")
    for rule in rules:
        if not (isinstance(rule, type) and issubclass(rule, ThresholdRule) and rule.name):
            raise InputError(
                f"rules are classes of rules, such as KLRule, got {rule!r}: thresholds come later, in curves or cost."
            )
        rule.check(model)
    return list(rules)


def _rows(run: Run, rows: slice) -> Run:
    """The run of some of the prompts."""
    return replace(
        run,
        tokens=run.tokens[rows],
        attention_mask=run.attention_mask[rows],
        visible=None if run.visible is None else run.visible[rows],
        position_ids=run.position_ids if len(run.position_ids) == 1 else run.position_ids[rows],
        state=None if run.state is None else run.state[rows],
    )


class _Tracer:
    """Asks the meters after every loop of a run, for the tokens that are judged."""

    def __init__(self, model: LoopedModel, run: Run, judged: Bool[Tensor, "batch pos"], meters: list[Meter]):
        self.model, self.run, self.judged, self.meters = model, run, judged, meters
        self.frame = model.frame(run)
        self.final: Tensor
        self.entered: Tensor
        self.statistics: list[Tensor] = []  # [rule, rows] after each loop
        self.kl: list[Tensor] = []
        self.same: list[Tensor] = []

    def trace(self) -> None:
        """Run to the end, then again with a look at every loop."""
        self.final = log_probs_of(cast(Tensor, self.model.execute(self.run))[self.judged])
        with self.model.hooks(fwd_hooks=[("hook_state_pre", self.enter), ("hook_state_post", self.leave)]):
            self.model.execute(self.run, return_type=None)
        del self.final, self.entered

    def enter(self, state: Float[Tensor, "batch pos d_model"], hook: LoopHookPoint) -> None:
        """A hook on the state that enters a loop."""
        self.entered = state[self.judged]

    def leave(self, state: Float[Tensor, "batch pos d_model"], hook: LoopHookPoint) -> None:
        """A hook on the state that leaves a loop."""
        transformer, rows = self.model.transformer, state[self.judged]
        end = LoopEnd(
            loop=hook.loop or 0,
            state=rows,
            state_before=self.entered,
            read=lambda: transformer.unembed(transformer.finish(state, self.frame)[self.judged]),
            gate=transformer.exit_logit,
        )
        self.statistics.append(torch.stack([meter(end).to(self.final.dtype).cpu() for meter in self.meters]))
        self.kl.append(kl_divergence(self.final, end.log_probs).cpu())
        self.same.append((end.log_probs.argmax(-1) == self.final.argmax(-1)).cpu())
