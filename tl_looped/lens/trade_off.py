"""What early exits save and what they cost on a set of prompts, over a range of thresholds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import cast

import pandas as pd
import plotly.graph_objects as go
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from typing_extensions import Unpack

from tl_looped.engine.checks import check_eval, check_number
from tl_looped.engine.errors import InputError, check_count
from tl_looped.engine.numbers import first_met, log_probs_of
from tl_looped.engine.results import Result
from tl_looped.engine.runs import Prompts, Run, RunOptions, with_run_options
from tl_looped.engine.schedule import HookSite, LoopCount
from tl_looped.generation import LoopEnd
from tl_looped.lens.exits import RULES, GateRule, Meter, StableTopRule, ThresholdRule
from tl_looped.lens.measures import kl_divergence
from tl_looped.lens.reads import Positions, choose_positions, table_of
from tl_looped.model import LoopedModel, check_looped
from tl_looped.observe.batch import chunks
from tl_looped.observe.measure import READOUT
from tl_looped.observe.watching import watch
from tl_looped.viz.readout import exit_curves

_STATES = ("hook_state_pre", "hook_state_post")
_GATE = "hook_exit_gate"
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
        """One row for each loop and token: loop, batch, pos, kl_to_final, same_top, and each rule's statistic."""
        labels = {"loop": range(self.n_loops), "row": range(len(self.pos))}
        columns = {"batch": self.batch, "pos": self.pos, "kl_to_final": self.kl_to_final, "same_top": self.same_top}
        columns |= dict(zip(self.rules, self.statistics, strict=True))
        return table_of(labels, torch.ones_like(self.same_top), columns).drop(columns="row")

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


@with_run_options
def trace_exits(
    model: LoopedModel,
    prompts: Prompts,
    n_loops: LoopCount | None = None,
    *,
    rules: Sequence[type[ThresholdRule]] | None = None,
    positions: Positions = None,
    batch_size: int | None = None,
    **options: Unpack[RunOptions],
) -> ExitTrace:
    """Run twice, first for what the whole run says, and note what every exit rule sees after every loop.

    Args:
        model: the model.
        prompts: in any form; padding is left out.
        n_loops: loops of the full run; None for the count the model was trained with.
        rules: classes of rules; None for all that the model can have.
        positions: which to judge, as in `logit_lens`; all by default.
        batch_size: most prompts to run at once, of the same length. Log probabilities of two loops and of the whole
            run are held for all positions judged of so many prompts. None for all prompts, padded.
        options: see `RunOptions`.

    Raises:
        InputError: fewer than two loops, no rule, a rule that the model can't have, or a position that there is not.
    """
    check_eval(check_looped(model, several_stacks=True))
    runs = model.prepare(prompts, n_loops, **options)
    if runs.n_loops < 2 or not runs.whole:
        raise InputError(
            "exits need whole runs of at least two loops: leave out start_at_loop and stop_at_loop, and pass n_loops "
            f"of at least 2, got n_loops={runs.n_loops}."
        )
    chosen = torch.tensor(choose_positions(positions, runs.rows.longest))
    rules = _checked(model, rules)
    parts: Sequence[list[int] | None] = [None]
    if batch_size is not None:
        parts = runs.equal_lengths(check_count("batch_size", batch_size))
    found: list[dict[str, Tensor]] = []
    for part in parts:
        run = model.batch_of(runs, part)
        batch, pos = run.attention_mask.cpu().nonzero().unbind(-1)
        places = {"batch": batch, "pos": pos}
        if part is not None:  # without padding: where the tokens stand beside those of all prompts
            at = torch.stack([runs.rows.places(row) for row in part])
            places = {"batch": torch.tensor(part)[batch], "pos": at[batch, pos]}
        judged = torch.isin(places["pos"], chosen)
        if not bool(judged.any()):
            continue
        kept = {name: values[judged] for name, values in places.items()}
        found.append({**kept, **_trace(model, run, (batch[judged], pos[judged]), rules)})
    if not found:
        raise InputError("the positions hold only padding: leave out positions to judge all tokens.")
    columns = {name: torch.cat([part[name] for part in found], dim=-1) for name in found[0]}
    order = (columns["batch"] * runs.rows.longest + columns["pos"]).argsort()
    return ExitTrace(
        made_by={"model": model.cfg.model_name, **model.batch_of(runs, parts[0]).describe()},
        rules=tuple(rule.name for rule in rules),
        n_loops=runs.n_loops,
        **{name: values[..., order] for name, values in columns.items()},
    )


def _checked(model: LoopedModel, rules: Sequence[type[ThresholdRule]] | None) -> list[type[ThresholdRule]]:
    if rules is None:
        rules = [rule for rule in RULES.values() if not issubclass(rule, GateRule) or model.transformer.exit_logit]
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


@torch.no_grad()
def _trace(
    model: LoopedModel, run: Run, judged: tuple[Tensor, Tensor], rules: Sequence[type[ThresholdRule]]
) -> dict[str, Tensor]:
    """What the rules' meters say of the tokens judged, [rule, loop, rows], and what stopping would cost."""
    transformer = model.transformer
    judged = judged[0].to(model.device), judged[1].to(model.device)
    gated = transformer.exit_logit is not None
    names = [*(HookSite(name, model.cfg.head_stack).name for name in _STATES), READOUT, *([_GATE] if gated else [])]
    final = cast(Tensor, model.execute(run))[judged]
    pieces = [(piece, log_probs_of(final[piece]), [rule.meter() for rule in rules]) for piece in chunks(*final.shape)]
    latest: dict[str, Tensor] = {}
    found: dict[str, list[Tensor]] = {"statistics": [], "kl_to_final": [], "same_top": []}

    def see(site: HookSite, x: Tensor) -> None:
        latest[site.component] = x[judged]
        if site.component == names[-1]:
            ends = [judge(site.loop or 0, *piece) for piece in pieces]
            for name, values in found.items():
                values.append(torch.cat([end[name] for end in ends], dim=-1).cpu())

    def judge(loop: int, piece: slice, last: Tensor, meters: Sequence[Meter]) -> dict[str, Tensor]:
        before, state, out = (latest[name][piece] for name in (*_STATES, READOUT))
        end = LoopEnd(
            loop=loop,
            state=state,
            state_before=before,
            read=lambda: transformer.unembed(out),
            gate=(lambda: latest[_GATE][piece]) if gated else None,
        )
        return {
            "statistics": torch.stack([meter(end).to(last.dtype) for meter in meters]),
            "kl_to_final": kl_divergence(last, end.log_probs),
            "same_top": end.log_probs.argmax(-1) == last.argmax(-1),
        }

    watch(model, run, names, see, only_loops=True)
    return {name: torch.stack(values, dim=-2) for name, values in found.items()}
