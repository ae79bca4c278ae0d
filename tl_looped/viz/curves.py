"""A number for every layer call, drawn in the paper's three groupings."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import plotly.graph_objects as go
from jaxtyping import Float
from torch import Tensor

from tl_looped.engine.errors import InputError
from tl_looped.engine.schedule import CORE, LoopSchedule, Pass
from tl_looped.viz.figure import Figure
from tl_looped.viz.parts import add_band, curve, explain_colors
from tl_looped.viz.style import (
    BLUE,
    GREEN,
    INK,
    LAYER_SCALE,
    LOOP_SCALE,
    ORANGE,
    PLOT_WIDTH,
    base_layout,
    curve_axes,
    heading,
    layer_colors,
    loop_axis,
    loop_colors,
    numbers,
    plotly_text,
)

Group = Literal["depth", "loop", "layer"]
Band = tuple[Float[Tensor, " depth"], Float[Tensor, " depth"]]

_GREYS, _GREY_DASHES = ("#8A94A0", "#5B6570"), ("dash", "dot")  # layers that run once: first those before the loops
_DASHES = ("solid", "dash", "dot", "dashdot")  # of stacks that loop, where there are several
_STYLES = ((BLUE, "circle"), (ORANGE, "diamond"), (GREEN, "square"))  # of a few curves beside each other
_MOST_IN_LEGEND = 10  # more lines get a colour bar instead
_MOST_BANDS = 6  # of more lines the bands would cover each other
_NAME_SIZE = 11  # of the passes' names above a plot, in pixels
_MOST_MARKERS = 600  # points in a figure up to which every one has a marker that can be seen


@dataclass(frozen=True)
class _Line:
    """One line of the figure: which layer calls, where, and how it looks."""

    name: str
    depths: Sequence[int]
    x: Sequence[int] | Sequence[float]
    color: str
    dash: str = "solid"
    looped: bool = True


def grouped_curves(
    values: Float[Tensor, " depth"],
    schedule: LoopSchedule,
    group: Group = "depth",
    *,
    label: str,
    unit: str = "",
    title: str = "",
    name: str = "looped model",
    band: Band | None = None,
    band_name: str = "band",
    log: bool = False,
    reference: Float[Tensor, " reference_depth"] | None = None,
    reference_name: str = "feedforward model",
) -> go.Figure:
    """One number for every layer call, as the paper groups them.

    - "depth": one line over the realised depth, with the loops marked.
    - "loop": a line for every loop over the relative depth in its block (0: its first layer, 1: its last; a block of
      one layer lies at 0.5), later loops more yellow; layers that run once are grey.
    - "layer": a line for every layer that loops, over loops, later layers greener; layers that run once have no
      place here.

    NaN is a gap. More than ten lines get a colour bar instead of a legend.

    Args:
        values: one for each layer call, in the order of `schedule.layer_calls()`.
        schedule: of the run that they come from.
        group: which grouping.
        label: what was measured.
        unit: its unit; "" for none.
        title: of the figure.
        name: of the curve, beside a reference.
        band: (low, high) around the values, such as quantiles. Drawn around up to six lines; in the text of every
            point.
        band_name: what the band is, such as "quartiles over prompts".
        log: a logarithmic axis. What is not above zero has no place on it, and a note counts it.
        reference: the curve of a feedforward model, one value a layer, drawn over its own depth.
        reference_name: what to call that.

    Raises:
        InputError: another number of values than layer calls; an unknown grouping; nothing to draw; a reference over
            loops, which it does not have.

    Source:
        arXiv 2604.11791, the figures of sections 4 and 5.
    """
    _check(values, schedule, group, band, reference)
    shown, hidden = _drawable(values, log)
    lines = _lines(schedule, group, name)
    drawn = [line for line in lines if any(shown[d] is not None for d in line.depths)]
    if not any(line.looped for line in drawn):
        kind, mend = ("positive", ": pass log=False") if hidden else ("finite", "")
        where = "" if group == "depth" else " in any loop"
        raise InputError(f"{label} has no {kind} value{where}, so there is nothing to draw{mend}.")
    fig = Figure()
    edges = None if band is None else [_drawable(edge, log)[0] for edge in band]
    if edges is not None and len(drawn) <= _MOST_BANDS:
        for line in drawn:
            low, high = ([edge[d] for d in line.depths] for edge in edges)
            add_band(fig, line.x, low, high, line.color)
    in_legend = sum(line.looped for line in drawn) <= _MOST_IN_LEGEND
    alone = group == "depth" and reference is None
    details = _details(schedule, edges, band_name)
    for line in drawn:
        _draw(fig, line, shown, details, unit, (in_legend or not line.looped) and not alone)
    if reference is not None:
        _draw_reference(fig, reference, group, reference_name, log)
    _lay_out(fig, schedule, group, label if not unit else f"{label}{'<br>' if len(label) > 30 else ' '}({unit})", title)
    if not in_legend:
        _color_bar(fig, schedule, group)
    if log:
        _log_axis(fig, [value for value in shown if value is not None], hidden)
    return fig


def _check(values: Tensor, schedule: LoopSchedule, group: str, band: Band | None, reference: Tensor | None) -> None:
    if group not in get_args(Group):
        raise InputError(f"group must be one of {get_args(Group)}, got {group!r}.")
    if group != "depth" and not _looping(schedule):
        raise InputError(f"this model has no loops ({schedule.describe()}): pass group='depth'.")
    for name, given in (("values", values), *(("band", edge) for edge in band or ())):
        if tuple(given.shape) != (schedule.depth,):
            raise InputError(
                f"{name} must hold one number for each of the {schedule.depth} layer calls of {schedule.describe()}, "
                f"got shape {tuple(given.shape)}: pass the schedule of the run, cfg.schedule(n_loops)."
            )
    if reference is not None and group == "layer":
        raise InputError("a feedforward model has no loops: pass group='loop' or 'depth' with a reference.")
    if reference is not None and not bool(reference.isfinite().any()):
        raise InputError("reference has no finite value, so there is nothing to draw.")


def _drawable(values: Tensor, log: bool) -> tuple[list[float | None], int]:
    """The numbers with gaps where there is nothing to draw, and how many a logarithmic axis hides."""
    found = numbers(values)
    shown = [None if log and value is not None and value <= 0 else value for value in found]
    return shown, sum(value is not None for value in found) - sum(value is not None for value in shown)


def _looping(schedule: LoopSchedule) -> list[str]:
    return [stack for stack in schedule.stacks() if schedule.n_loops(stack)]


def _stack_name(stack: str) -> str:
    return "core" if stack == CORE else stack


def _depths(schedule: LoopSchedule, run: Pass) -> range:
    first = schedule.realised_depth(run.stack, 0, run.loop)
    return range(first, first + run.n_layers)


def _once(schedule: LoopSchedule, run: Pass) -> tuple[str, str]:
    """(colour, dash) of a stack that runs once."""
    late = schedule.passes.index(run) > 0
    return _GREYS[late], _GREY_DASHES[late]


def _lines(schedule: LoopSchedule, group: str, name: str) -> list[_Line]:
    if group == "depth":
        return [_Line(name, range(schedule.depth), range(schedule.depth), BLUE)]
    return _by_loop(schedule) if group == "loop" else _by_layer(schedule)


def _by_loop(schedule: LoopSchedule) -> list[_Line]:
    stacks, lines = _looping(schedule), []
    colors = {stack: loop_colors(schedule.n_loops(stack)) for stack in stacks}
    for run in schedule.passes:
        x = [i / (run.n_layers - 1) for i in range(run.n_layers)] if run.n_layers > 1 else [0.5]
        depths = _depths(schedule, run)
        if run.loop is None:
            color, dash = _once(schedule, run)
            lines.append(_Line(run.stack, depths, x, color, dash, looped=False))
            continue
        name = f"loop {run.loop}" if len(stacks) == 1 else f"{run.stack} loop {run.loop}"
        color = colors[run.stack][run.loop]
        lines.append(_Line(name, depths, x, color, _DASHES[stacks.index(run.stack) % len(_DASHES)]))
    return lines


def _by_layer(schedule: LoopSchedule) -> list[_Line]:
    stacks, lines = _looping(schedule), []
    for number, stack in enumerate(stacks):
        loops = range(schedule.n_loops(stack))
        for layer, color in enumerate(layer_colors(schedule.n_layers(stack))):
            depths = [schedule.realised_depth(stack, layer, t) for t in loops]
            name = f"{_stack_name(stack)} layer {layer}"
            lines.append(_Line(name, depths, loops, color, _DASHES[number % len(_DASHES)]))
    return lines


def _details(schedule: LoopSchedule, edges: Sequence[Sequence[float | None]] | None, band_name: str) -> list[str]:
    """What a point's text says under its value, for every layer call."""
    texts = []
    for depth, (stack, layer, loop) in enumerate(schedule.layer_calls()):
        name = "layer" if (stack, loop) == (CORE, None) else f"{_stack_name(stack)} layer"  # feedforward models
        during = "" if loop is None else f" in loop {loop}"
        spread = "" if edges is None else f"<br>{band_name}: {_text(edges[0][depth])} to {_text(edges[1][depth])}"
        texts.append(f"{name} {layer}{during}, realised depth {depth}{spread}")
    return texts


def _draw(
    fig: go.Figure,
    line: _Line,
    shown: Sequence[float | None],
    details: Sequence[str],
    unit: str,
    in_legend: bool,
) -> None:
    dense = len(shown) > _MOST_MARKERS
    y, hover = [shown[d] for d in line.depths], f"%{{y:.4g}} {unit}<br>%{{customdata}}<extra></extra>"
    look = {"customdata": [details[d] for d in line.depths], "hovertemplate": hover, "showlegend": in_legend}
    size, width = (3, 1) if dense else (6, 2)
    fig.add_trace(curve(y, line.name, line.color, x=line.x, dash=line.dash, width=width, size=size, **look))


def _text(value: float | None) -> str:
    return "–" if value is None else f"{value:.4g}"


def _draw_reference(fig: go.Figure, reference: Tensor, group: str, name: str, log: bool) -> None:
    shown, n = _drawable(reference, log)[0], len(reference)
    x = list(range(n)) if group == "depth" else [i / (n - 1) for i in range(n)] if n > 1 else [0.5]
    look = {"dash": "dashdot", "symbol": "diamond", "customdata": list(range(n))}
    fig.add_trace(curve(shown, plotly_text(name), INK, "%{y:.4g}<br>layer %{customdata}", x=x, **look))


def _color_bar(fig: go.Figure, schedule: LoopSchedule, group: str) -> None:
    """What the colours mean, for many lines; an invisible trace carries it."""
    stacks = _looping(schedule)
    counts = [schedule.n_loops(stack) if group == "loop" else schedule.n_layers(stack) for stack in stacks]
    what = "loop" if group == "loop" else "core layer" if stacks == [CORE] else "layer"
    explain_colors(fig, LOOP_SCALE if group == "loop" else LAYER_SCALE, max(counts) - 1, what)
    fig.update_layout(legend={"orientation": "h", "x": 0, "y": -0.2, "yanchor": "top"}, margin={"b": 90}, height=430)
    if len(stacks) > 1:
        for stack, dash in zip(stacks, _DASHES, strict=False):
            line = {"color": INK, "dash": dash}
            fig.add_trace(go.Scatter(x=[None], y=[None], mode="lines", name=stack, line=line, showlegend=True))


def _lay_out(fig: go.Figure, schedule: LoopSchedule, group: str, y_title: str, title: str) -> None:
    base_layout(
        fig,
        height=400,
        title=heading(title),
        margin={"l": 80, "r": 20, "t": 60 if title or group == "depth" else 36, "b": 60},
        legend={"font": {"size": 12}},
    )
    curve_axes(fig)
    fig.update_yaxes(title={"text": y_title}, automargin=True)
    if group == "loop":
        fig.update_xaxes(title={"text": "relative depth in the block (0: first layer, 1: last layer)"})
        fig.update_xaxes(range=[-0.03, 1.03])
    elif group == "layer":
        fig.update_xaxes(**loop_axis(max(schedule.n_loops(stack) for stack in _looping(schedule))))
    else:
        fig.update_xaxes(**loop_axis(schedule.depth, "realised depth (layer calls)"), showgrid=False)
        _mark_passes(fig, schedule)


def _log_axis(fig: go.Figure, drawn: Sequence[float], hidden: int) -> None:
    decades = math.log10(max(drawn) / min(drawn))
    step = max(1, round(decades / 8)) if decades > 1.5 else "D2" if decades > 0.5 else None
    fig.update_yaxes(type="log", exponentformat="power", dtick=step)
    if hidden:
        note = f"{hidden} value{'s' if hidden > 1 else ''} of zero or below not shown"
        place = {"x": 1, "y": 0, "xanchor": "right", "yanchor": "bottom", "xref": "paper", "yref": "paper"}
        fig.add_annotation(text=note, **place, showarrow=False, font={"size": 12})


def _mark_passes(fig: go.Figure, schedule: LoopSchedule) -> None:
    """Lines between the passes, and above them the names that there is room for."""
    if len(schedule.passes) == 1:
        return
    several = len(_looping(schedule)) > 1
    every = loop_axis(sum(run.loop is not None for run in schedule.passes))["dtick"]
    column = PLOT_WIDTH / schedule.depth
    marked = {run: i for i, run in enumerate(run for run in schedule.passes if run.loop is not None)}
    for run in schedule.passes:
        depths = _depths(schedule, run)
        if marked.get(run, 0) % every:
            continue
        if depths.start:
            fig.add_vline(x=depths.start - 0.5, line={"color": "#C3CAD2", "width": 1}, layer="below")
        name = run.stack if run.loop is None else f"{run.stack} {run.loop}" if several else f"loop {run.loop}"
        if _NAME_SIZE * 0.7 * len(name) < column * run.n_layers * (1 if run.loop is None else every):
            middle = depths.start if every > 1 and run.loop is not None else (depths.start + depths.stop - 1) / 2
            font = {"size": _NAME_SIZE, "color": _GREYS[1]}
            fig.add_annotation(text=name, x=middle, y=1, yref="paper", yanchor="bottom", showarrow=False, font=font)


def layer_shares(
    shares: Mapping[str, Float[Tensor, " layer"]], names: Sequence[str], label: str, title: str = ""
) -> go.Figure:
    """A few shares of every layer, one line each, over the layers in order; they do not depend on the loop.

    Args:
        shares: up to three, by name.
        names: of the layers.
        label: what they are shares of.
        title: of the figure.
    """
    fig = Figure()
    for (name, share), (color, symbol) in zip(shares.items(), _STYLES, strict=False):
        look = {"symbol": symbol, "size": 7, "customdata": list(names)}
        fig.add_trace(curve(numbers(share), name, color, "%{customdata}: %{y:.2%}", **look))
    kept = list(range(0, len(names), -(-len(names) // 24)))
    curve_axes(fig)
    fig.update_xaxes(title={"text": "layer"}, tickmode="array", tickvals=kept, ticktext=[names[i] for i in kept])
    fig.update_yaxes(title={"text": label}, tickformat=".1%", rangemode="tozero")
    return base_layout(fig, height=360, title=heading(title))


def aligned_curves(curves: Mapping[str, Float[Tensor, " layer"]], title: str = "") -> go.Figure:
    """Curves of models of different depth, each stretched to relative depth, in standard deviations from its mean.

    Args:
        curves: up to three, by name, one finite value a layer.
        title: of the figure.
    """
    fig = Figure()
    for (name, values), (color, symbol) in zip(curves.items(), _STYLES[: len(curves)], strict=True):
        n = len(values)
        deviation = values - values.mean()
        scale = float(deviation.square().mean().sqrt()) or 1.0
        look = {"x": [i / (n - 1) for i in range(n)], "symbol": symbol, "size": 7, "customdata": numbers(values)}
        hover = "%{customdata:.4g} at relative depth %{x:.2f}<extra>" + name + "</extra>"
        fig.add_trace(curve(numbers(deviation / scale), f"{name} ({n} layers)", color, hovertemplate=hover, **look))
    curve_axes(fig)
    fig.update_xaxes(title={"text": "relative depth (0: first layer, 1: last layer)"})
    fig.update_yaxes(title={"text": "deviation from the mean, in σ"})
    return base_layout(fig, height=380, title=heading(title))


def loop_line(values: Float[Tensor, " loop"], texts: Sequence[str], label: str, title: str = "") -> go.Figure:
    """One number for each loop.

    Args:
        values: NaN is a gap.
        texts: what to say at each point.
        label: what was measured.
        title: of the figure.

    Raises:
        InputError: no finite value.
    """
    if not bool(values.isfinite().any()):
        raise InputError(f"the {label} has no finite value, so there is nothing to draw.")
    look = {"customdata": list(texts), "size": 7 if len(values) <= 32 else 4}
    fig = Figure(curve(numbers(values), "", BLUE, "loop %{x}: %{y:.3f}<br>%{customdata}", **look))
    curve_axes(fig)
    fig.update_xaxes(**loop_axis(len(values)))
    fig.update_yaxes(title={"text": label})
    return base_layout(fig, height=360, title=heading(title))
