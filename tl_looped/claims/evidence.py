"""The paper's claims on one model, each as an effect with an interval and the same effect with random weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import torch
from jaxtyping import Float
from scipy.stats import rankdata
from torch import Tensor
from tqdm.auto import tqdm
from typing_extensions import Unpack

from tl_looped.attention import PATTERN_STEP, TOTAL_VARIATION
from tl_looped.claims.architectures import NONE, REPORTED
from tl_looped.dynamics import DISTANCE, STEP, Convergence, convergence_of
from tl_looped.dynamics.tokens import prepare_long
from tl_looped.engine.checks import check_eval, check_number
from tl_looped.engine.errors import InputError, check_count
from tl_looped.engine.numbers import interval, wide_dtype
from tl_looped.engine.results import Result
from tl_looped.engine.runs import Prompts, RunOptions, Runs, with_run_options
from tl_looped.lens import LOSS
from tl_looped.model import LoopedModel, check_looped
from tl_looped.observe import Observed, observe
from tl_looped.stages import STAGE_MEASURES
from tl_looped.viz.claims import claim_intervals

FEWEST_PROMPTS, FEWEST_LAYERS = 4, 8
PerPrompt = Float[Tensor, " prompt"]
_TO_LOSS = 4  # times the trained loop count


@dataclass(frozen=True)
class _Claim:
    """What is measured of a claim, and from which number on it holds.

    Attributes:
        number: of the claim in the paper's order.
        name: of the effect.
        words: what the effect is.
        threshold: the claim holds above it (or below, where `less`).
        less: whether small numbers are for the claim.
    """

    number: int
    name: str
    words: str
    threshold: float
    less: bool = False


CLAIMS = (
    _Claim(1, "layers_rest_together", "share of tokens of which all core layers come to rest, or none does", 0.9),
    _Claim(2, "attention_follows_state", "rank correlation of pattern steps with state steps, by loop and layer", 0.5),
    _Claim(3, "attention_settles_at", "first loop after which no loop moves more than `moved` of attention", 2.0, True),
    _Claim(4, "stages_repeat", "correlation over layers of each stage measure between neighbouring loops", 0.9),
    _Claim(4, "stages_are_the_baseline's", "the same with the feedforward model's, over relative depth", 0.5),
    _Claim(5, "loss_beyond_training", "loss at 4 times the trained loops less that at the trained, nats", 0.1, True),
    _Claim(6, "comes_to_rest", "share of tokens whose state, leaving the last core layer, comes to rest", 0.5),
)


@dataclass(frozen=True, eq=False, repr=False)
class Evidence(Result):
    """One row for each claim.

    Attributes:
        rows: of each: claim (its number), effect, words, value (mean over prompts), low and high (95 % interval by
            bootstrap over prompts), null, null_low and null_high (mean and range over models of the same config with
            random weights), verdict; NaN and a reason where it can't be told.
        effects: of each effect that was measured, a number for each prompt.
    """

    rows: tuple[dict[str, Any], ...]
    effects: dict[str, Tensor]

    def to_dataframe(self) -> pd.DataFrame:
        """One row for each effect."""
        return pd.DataFrame(self.rows)

    def plot(self) -> go.Figure:
        """Each effect with its interval, beside those of random weights."""
        return claim_intervals(self.rows, f"The paper's claims: {self.made_by.get('model', '')}")


@with_run_options
def paper_claims(
    model: LoopedModel,
    prompts: Prompts,
    n_loops: int | None = None,
    *,
    baseline: LoopedModel | None = None,
    null_seeds: int = 3,
    moved: float = 0.05,
    resamples: int = 2000,
    bootstrap_seed: int = 0,
    batch_size: int = 8,
    progress: bool = True,
    **options: Unpack[RunOptions],
) -> Evidence:
    """Claims 1 to 6 of arXiv 2604.11791 on one model: effect, interval, null of random weights, verdict.

    1. *Each core layer has a fixed point when one has*: share of tokens of which all layers rest, or none.
    2. *Attention changes little where the state does*: rank correlation over (loop, layer) of ‖A_t − A_{t−1}‖ with
       ‖x_t − x_{t−1}‖ / ‖x_t‖.
    3. *Patterns stabilise within one or two loops*: the first loop after which no loop moves more than `moved` of the
       attention (total variation, mean over layers and heads).
    4. *Stages repeat in every loop*: correlation over core layers of each stage measure between neighbouring loops of
       the trained ones, mean over measures; with a baseline also with its curve over relative depth. Of fewer than 8
       layers too few to tell.
    5. *Models with fixed points keep their loss at untrained loop counts*: loss at 4 T less that at T.
    6. *Norm and injection decide*: share of tokens whose state comes to rest (as `convergence` judges), against what
       the paper reports of such models.

    A claim holds where the interval is on its side of the threshold (`CLAIMS`). Repetition alone makes much of this: a
    model of random weights loops too, and where it shows the same, the verdict says so.

    Args:
        model: with one core that loops.
        prompts, options: as in `observe`; four or more, each counting as one.
        n_loops: loops after which a state counts as its end; None for 128. At least 4 T, for claim 5.
        baseline: a feedforward model with the same tokenizer.
        null_seeds: how many models of random weights.
        moved: see claim 3.
        resamples, bootstrap_seed: of the bootstrap.
        batch_size, progress: as in `observe`.

    Raises:
        InputError: fewer than four prompts, too few loops, a baseline that loops, a model that does not, or one in half
            precision, in which nothing comes to rest.

    Source:
        arXiv 2604.11791. Effects and thresholds are this library's.

    Example:
        found = paper_claims(model, ["a=4; c=a; ? c", "b=1; d=b; ? d", "a=2; ? a", "c=7; a=c; ? a"], 32)
        found.to_dataframe()[["claim", "effect", "value", "low", "high", "null", "verdict"]]
    """
    check_eval(check_looped(model))
    if model.cfg.n_loops < 2:
        raise InputError("the claims are on loops, and this model was trained with one: pass it as baseline=.")
    if wide_dtype(model.dtype) != model.dtype:
        raise InputError(
            f"this model is in {model.dtype}, in which states do not come closer to rest than about one percent: load "
            "it in another format, from_pretrained(..., dtype=torch.float32)."
        )
    _check_baseline(baseline)
    check_count("null_seeds", null_seeds)
    check_count("resamples", resamples, minimum=100)
    check_number("moved", moved, 0.0, 1.0)
    runs = prepare_long(model, prompts, n_loops, options, least=_TO_LOSS * model.cfg.n_loops)
    if len(runs) < FEWEST_PROMPTS:
        raise InputError(
            f"{len(runs)} prompts are too few for an interval over prompts: give {FEWEST_PROMPTS} or more."
        )
    stages = None if baseline is None else _stage_curves(baseline, runs, batch_size)
    found = _effects(model, runs, stages, moved, batch_size, progress)
    nulls = []
    for seed in tqdm(range(null_seeds), desc="Random weights", disable=not progress):
        random = LoopedModel.from_config(model.cfg, seed=seed, device=model.device, dtype=model.dtype)
        nulls.append(
            {n: float(x.nanmean()) for n, x in _effects(random, runs, stages, moved, batch_size, False).items()}
        )
    rows = [_row(model, claim, found, nulls, resamples, bootstrap_seed) for claim in CLAIMS if claim.name in found]
    described = model.batch_of(runs, [0]).describe()
    made_by = {
        "model": model.cfg.model_name,
        **described,
        "prompts": len(runs),
        "null_seeds": null_seeds,
        "moved": moved,
    }
    made_by |= {"resamples": resamples, "bootstrap_seed": bootstrap_seed}
    made_by |= {"baseline": None if baseline is None else baseline.cfg.model_name}
    return Evidence(made_by=made_by, rows=tuple(rows), effects=found)


def _check_baseline(baseline: LoopedModel | None) -> None:
    if baseline is None:
        return
    cfg = check_looped(baseline).cfg
    if cfg.n_loops > 1:
        raise InputError(f"baseline loops {cfg.n_loops} times: give the feedforward model beside it.")
    if cfg.n_prelude or cfg.n_coda:
        raise InputError(
            f"baseline has only {cfg.n_core} of its {len(cfg.layers())} layers in the core, and all are compared: load "
            "it without loop_layers=."
        )


def _effects(
    model: LoopedModel, runs: Runs, stages: dict[str, Tensor] | None, moved: float, batch_size: int, progress: bool
) -> dict[str, PerPrompt]:
    """Every effect, a number for each prompt."""
    measures = [DISTANCE, STEP, PATTERN_STEP, TOTAL_VARIATION, *STAGE_MEASURES]
    measures += [LOSS] if model.cfg.causal else []
    seen = observe(model, runs, measures=measures, per_token=[DISTANCE.name], batch_size=batch_size, progress=progress)
    trained, n, judged = model.cfg.n_loops, len(runs), convergence_of(seen)
    found = {
        "layers_rest_together": _together(judged, n),
        "attention_follows_state": _follows(seen),
        "attention_settles_at": _settles(seen, moved),
        "stages_repeat": _repeats(seen, trained),
        "comes_to_rest": _of_prompts(judged.converged[-1], judged.places["prompt"], n),
    }
    if stages is not None:
        found["stages_are_the_baseline's"] = _like(seen, stages, trained)
    if model.cfg.causal:
        loss = seen.prompts_by_loop(LOSS.name)
        found["loss_beyond_training"] = loss[:, _TO_LOSS * trained - 1] - loss[:, trained - 1]
    return {name: values.double() for name, values in found.items()}


def _of_prompts(values: Float[Tensor, " token"], prompts: Tensor, n: int) -> PerPrompt:
    """Means over each prompt's tokens."""
    return torch.stack([values[prompts == prompt].nanmean() for prompt in range(n)])


def _together(judged: Convergence, n: int) -> PerPrompt:
    rests = judged.converged  # [layer, token]; NaN where nothing was judged
    same = ((rests == 1).all(0) | (rests == 0).all(0)).double()
    return _of_prompts(same.masked_fill(rests.isnan().any(0), torch.nan), judged.places["prompt"], n)


def _follows(seen: Observed) -> PerPrompt:
    pattern, state = (seen.prompts_by_loop(one.name)[:, 1:] for one in (PATTERN_STEP, STEP))
    pattern = pattern.flatten(3).mean(-1) if pattern.ndim > 3 else pattern
    return _rank_correlation(pattern.flatten(1), state.flatten(1))


def _settles(seen: Observed, moved: float) -> PerPrompt:
    changes = seen.prompts_by_loop(TOTAL_VARIATION.name).flatten(2).nanmean(-1)  # [prompt, loop]; undefined in loop 0
    loops = torch.arange(changes.shape[1])
    return torch.where(changes > moved, loops, 0).amax(1).double()


def _repeats(seen: Observed, trained: int) -> PerPrompt:
    each = []
    for measure in STAGE_MEASURES:
        curves = _by_layer(seen, measure.name)[:, :trained]
        each.append(_correlation(curves[:, 1:], curves[:, :-1]).nanmean(1))
    return torch.stack(each).nanmean(0)


def _like(seen: Observed, stages: dict[str, Tensor], trained: int) -> PerPrompt:
    each = []
    for measure in STAGE_MEASURES:
        curves = _by_layer(seen, measure.name)[:, :trained]
        theirs = _resampled(stages[measure.name], curves.shape[-1])
        each.append(_correlation(curves, theirs[:, None].expand_as(curves)).nanmean(1))
    return torch.stack(each).nanmean(0)


def _by_layer(seen: Observed, name: str) -> Float[Tensor, "prompt loop layer"]:
    values = seen.prompts_by_loop(name)
    return values.flatten(3).nanmean(-1) if values.ndim > 3 else values


def _stage_curves(baseline: LoopedModel, runs: Runs, batch_size: int) -> dict[str, Tensor]:
    """[prompt, layer] of each stage measure in a feedforward model, on the very tokens."""
    tokens = [runs.rows.unpadded(row).tolist() for row in range(len(runs))]
    seen = observe(baseline, tokens, measures=STAGE_MEASURES, batch_size=batch_size, progress=False)
    return {measure.name: _by_layer(seen, measure.name)[:, 0] for measure in STAGE_MEASURES}


def _resampled(curves: Float[Tensor, "prompt layer"], layers: int) -> Float[Tensor, "prompt other_layers"]:
    """At as many points of relative depth, linearly between."""
    to, at = np.linspace(0, 1, layers), np.linspace(0, 1, curves.shape[1])
    return torch.tensor(np.stack([np.interp(to, at, curve) for curve in curves.double().numpy()]))


def _rank_correlation(a: Float[Tensor, "prompt place"], b: Float[Tensor, "prompt place"]) -> PerPrompt:
    """Spearman's, ties at their mean rank: where nothing moves any more, steps are alike."""
    return _correlation(*(torch.from_numpy(rankdata(x.numpy(), axis=1)) for x in (a, b)))


def _correlation(a: Tensor, b: Tensor) -> Tensor:
    """Pearson's, over the last axis; NaN where one is constant."""
    a, b = (x.double() - x.double().mean(-1, keepdim=True) for x in (a, b))
    size = a.norm(dim=-1) * b.norm(dim=-1)
    return torch.where(size > 0, (a * b).sum(-1) / size, torch.nan)


def _row(
    model: LoopedModel,
    claim: _Claim,
    found: dict[str, PerPrompt],
    nulls: list[dict[str, float]],
    resamples: int,
    seed: int,
) -> dict[str, Any]:
    values = found[claim.name]
    values = values[~values.isnan()]
    nothing = [null[claim.name] for null in nulls if not np.isnan(null[claim.name])] or [torch.nan]
    row: dict[str, Any] = {"claim": claim.number, "effect": claim.name, "words": claim.words, "value": torch.nan}
    row |= {"low": torch.nan, "high": torch.nan, "null": float(np.mean(nothing))}
    row |= {"null_low": min(nothing), "null_high": max(nothing)}
    reason = _why_not(model, claim, len(values))
    if len(values) >= FEWEST_PROMPTS:
        row["value"] = float(values.mean())
        row["low"], row["high"] = map(float, interval(values, resamples, seed))
    return {**row, "verdict": f"can't tell: {reason}" if reason else verdict(model, claim, row, found)}


def _why_not(model: LoopedModel, claim: _Claim, n: int) -> str:
    layers = model.cfg.n_core
    if n < FEWEST_PROMPTS:
        return f"defined on {n} prompts"
    if claim.number == 4 and layers < FEWEST_LAYERS:
        return f"too few layers ({layers}, and {FEWEST_LAYERS} are needed)"
    if claim.number == 1 and layers == 1:
        return "one core layer"
    if claim.number == 6 and not _is_of_the_paper(model):
        return f"the paper has no {model.cfg.norm_placement!r} norms with loop_norm={model.cfg.loop_norm!r}"
    return ""


def _is_of_the_paper(model: LoopedModel) -> bool:
    """Whether section 4.2 has such norms: Ouro's with one that closes each loop, the others without."""
    cfg = model.cfg
    closes = cfg.loop_norm == "each" if cfg.norm_placement == "output_sandwich" else not cfg.norms_each_loop
    return closes and (cfg.reads_input_in_loops, cfg.norm_placement) in REPORTED


def verdict(model: LoopedModel, claim: _Claim, row: dict[str, Any], found: dict[str, PerPrompt]) -> str:
    """What the interval supports."""
    inside, outside = row["low"] >= claim.threshold, row["high"] < claim.threshold
    if claim.less:
        inside, outside = row["high"] <= claim.threshold, row["low"] > claim.threshold
    if claim.number == 5:  # the claim is on models with fixed points; others lose
        rests = float(found["comes_to_rest"].nanmean()) >= 0.5
        kept = "the loss is kept" if inside else "the loss grows" if outside else ""
        if not kept:
            return "can't tell: the interval reaches over the threshold"
        what = "states rest" if rests else "states do not rest"
        return f"{'holds' if rests == inside else 'does not hold'}: {what}, and {kept}"
    if claim.number == 6:
        reported = REPORTED[model.cfg.reads_input_in_loops, model.cfg.norm_placement]
        if not (inside or outside):
            return "can't tell: the interval reaches over the threshold"
        says = (reported == NONE) == outside
        return f"{'holds' if says else 'does not hold'}: the paper reports {reported!r} of untrained models"
    if not inside:
        return "does not hold" if outside else "can't tell: the interval reaches over the threshold"
    if np.isnan(row["null"]):
        return "holds, and with random weights the effect is not defined"
    above = row["high"] < row["null_low"] if claim.less else row["low"] > row["null_high"]
    return "holds, and not with random weights" if above else "holds, but with random weights as well"
