"""What a patched run is judged by, and the result that the judgements are collected in."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import pandas as pd
import plotly.graph_objects as go
import torch
from jaxtyping import Float
from torch import Tensor
from transformer_lens.patching import PatchingResult

from tl_looped.engine.errors import InputError
from tl_looped.engine.results import AnyResult
from tl_looped.engine.runs import Run
from tl_looped.model import LoopedModel
from tl_looped.patching.sources import Source
from tl_looped.viz.patching import patching_heatmap

Metric = Callable[[Float[Tensor, "batch pos d_vocab"]], Tensor]
Reduce = Literal["scalar", "mean", "none"]

_AT_ONCE = 2**22  # logits that a metric is given in one call, at most, unless those of one cell are more


class Metrics:
    """One metric or several, evaluated as TransformerLens does.

    Args:
        metric: from logits [batch, pos, d_vocab] to a scalar, or to [batch]; or a mapping of names to such functions.
        reduce: "scalar": the metric returns a scalar. "mean": it returns [batch], averaged. "none": it returns [batch],
            kept.
        only_one: the call that takes no mapping; "" where one may be given.
    """

    def __init__(self, metric: Metric | Mapping[str, Metric], reduce: Reduce, only_one: str = ""):
        if reduce not in ("scalar", "mean", "none"):
            raise InputError(f"reduce must be 'scalar', 'mean' or 'none', got {reduce!r}.")
        self.several = isinstance(metric, Mapping)
        self.functions: dict[str, Metric] = dict(metric) if isinstance(metric, Mapping) else {"metric": metric}
        self.reduce = reduce
        self._one_by_one: set[str] = set()  # those that torch.vmap does not take
        if not self.functions or not all(callable(function) for function in self.functions.values()):
            raise InputError(f"metric must be a function of logits, or a mapping of names to such, got {metric!r}.")
        if self.several and only_one:
            raise InputError(
                f"{only_one} takes one metric, not a mapping of {sorted(self.functions)}: call it for each."
            )

    def __call__(self, logits: Float[Tensor, "batch pos d_vocab"]) -> Float[Tensor, "metric *batch"]:
        """All metrics of one batch: [metric], or [metric, batch] unless they are scalar.

        Raises:
            InputError: a metric of another shape, or one that is NaN.
        """
        values = torch.stack([self._value(name, logits) for name in self.functions])
        self.check(values)
        return values

    def of_cells(self, logits: Float[Tensor, "cell batch pos d_vocab"]) -> Float[Tensor, "metric cell *batch"]:
        """All metrics of many batches; nobody waits for their numbers, so `check` them in the end.

        A metric made of tensor operations is called once for many cells (`torch.vmap`); one that looks at numbers,
        draws or leaves torch, cell by cell.
        """
        at_once = max(1, _AT_ONCE // logits[0].numel())
        parts = [self._at_once(part) for part in logits.split(at_once)]
        return parts[0] if len(parts) == 1 else torch.cat(parts, 1)

    def _at_once(self, logits: Float[Tensor, "cell batch pos d_vocab"]) -> Float[Tensor, "metric cell *batch"]:
        values = []
        for name in self.functions:
            value = None
            if len(logits) > 1 and name not in self._one_by_one:
                try:
                    with warnings.catch_warnings():  # where vmap goes cell by cell itself, it is as we would
                        warnings.simplefilter("ignore")
                        value = torch.vmap(partial(self._value, name))(logits)
                except (RuntimeError, TypeError, ValueError):  # what vmap refuses; a metric's own error comes again
                    self._one_by_one.add(name)
            values.append(torch.stack([self._value(name, one) for one in logits]) if value is None else value)
        return torch.stack(values)

    def _value(self, name: str, logits: Tensor) -> Tensor:
        """One metric, of a shape that was asked for."""
        value = torch.as_tensor(self.functions[name](logits), device=logits.device)
        if not value.is_floating_point():
            value = value.to(logits.dtype)  # counts and hits
        wanted = () if self.reduce == "scalar" else (logits.shape[0],)
        if tuple(value.shape) != wanted:
            hint = "; or pass reduce='none' for a metric per prompt" if self.reduce == "scalar" else ""
            raise InputError(
                f"metric {name!r} must return shape {wanted} with reduce={self.reduce!r}, "
                f"got {tuple(value.shape)}{hint}."
            )
        return value

    def check(self, values: Float[Tensor, "metric *any"], describe: Callable[[int], str] | None = None) -> None:
        """Raise for a NaN.

        Args:
            values: of all metrics; with `describe`, [metric, cell, ...].
            describe: what a cell is called.
        """
        wrong = values.isnan()
        if not bool(wrong.any()):
            return
        metric, *rest = wrong.nonzero()[0].tolist()
        where = "" if describe is None else f" at {describe(rest[0])}"
        name = list(self.functions)[metric]
        raise InputError(f"metric {name!r} gives NaN{where}: check what it divides by and takes logarithms of.")


@dataclass(repr=False)
class LoopPatchingResult(PatchingResult, AnyResult):
    """TransformerLens's PatchingResult, with what made it.

    Attributes:
        site: the patched site.
        made_by: model, loop count, initial state, source and options of the call.
        str_tokens: the patched prompt's tokens, where there is a tokenizer and one prompt.
    """

    site: str = ""
    made_by: dict[str, Any] = field(default_factory=dict)
    str_tokens: list[str] | None = None

    __repr__ = AnyResult.__repr__

    @classmethod
    def of(
        cls,
        metrics: Metrics,
        values: Float[Tensor, "metric *cells"],
        baseline: Float[Tensor, "metric *batch"],
        index: pd.DataFrame,
        site: str,
        ran: tuple[LoopedModel, Run, Source],
        **options: Any,
    ) -> LoopPatchingResult:
        """From what the metrics gave for every cell, and for the unpatched run.

        Args:
            metrics: of the call.
            values: of the cells, and of each prompt in them unless the metric is scalar.
            baseline: of the unpatched run.
            index: a row for each cell; its columns are the axes of `values`.
            site: the patched site.
            ran: the model, the unpatched run and the source.
            options: what else made it.
        """
        model, run, source = ran
        if metrics.reduce == "mean":
            values, baseline = values.mean(-1), baseline.mean(-1)
        one_text = model.tokenizer is not None and len(run.tokens) == 1
        return cls(
            values=values if metrics.several else values[0],
            axis_names=list(index.columns),
            index_df=index,
            metric_names=list(metrics.functions),
            reduced=metrics.reduce != "none",
            baseline=baseline if metrics.several else baseline[0],
            has_metric_axis=metrics.several,
            site=site,
            made_by={"model": model.cfg.model_name, **run.describe(), "source": source.name, **options},
            str_tokens=model.to_str_tokens(run.tokens[0]) if one_text else None,
        )

    def __getitem__(self, metric_name: str) -> LoopPatchingResult:
        """One metric's result, with what made it."""
        one = super().__getitem__(metric_name)
        if isinstance(one, LoopPatchingResult):
            return one
        return LoopPatchingResult(**vars(one), site=self.site, made_by=self.made_by, str_tokens=self.str_tokens)

    def plot(self, metric_name: str | None = None) -> go.Figure:
        """The effect of every patch, averaged over prompts, as a heatmap.

        Args:
            metric_name: which metric, where there are several.
        """
        if self.has_metric_axis and metric_name is None:
            raise InputError(f"this result has the metrics {self.metric_names}: pass metric_name.")
        one: PatchingResult = self if metric_name is None else self[metric_name]
        effect = one.effect() if one.reduced else one.effect().mean(-1)
        title = f"{self.made_by.get('method', 'patching')} of {self.site}: {self.made_by.get('model', '')}"
        names = {"pos": self.str_tokens} if self.str_tokens else {}
        if "receiver" in self.axis_names:
            names["receiver"] = list(self.index_df["receiver"])
        return patching_heatmap(effect, self.axis_names, title, f"change of {one.metric_names[0]}", names)
