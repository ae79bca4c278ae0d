"""A drawing of what runs when: prelude, the loop with its injection, coda."""

from __future__ import annotations

import html

from tl_looped.engine.config import LoopedConfig
from tl_looped.engine.schedule import LoopCount
from tl_looped.viz.style import FONT, INK

Number = int | float

_MIDDLE = 170  # y of the line along which the stream flows
_GAP = 34  # between boxes, room for an arrow
_HEIGHT = 300
_FILL = {"prelude": "#DCEBF7", "core": "#FBE6D4", "coda": "#DDF0E7", "norm": "#E9ECF0", "plain": "#FFFFFF"}
_EDGE = {"prelude": "#0072B2", "core": "#D55E00", "coda": "#009E73", "norm": "#6B7580", "plain": "#6B7580"}


def schedule_svg(cfg: LoopedConfig, n_loops: LoopCount | None = None) -> str:
    """The model as an inline SVG picture, from tokens on the left to logits on the right.

    Args:
        cfg: the model.
        n_loops: how often the core runs, or of two stacks the pair; None for what it was trained with.
    """
    loops, inner = cfg.counts(n_loops)
    pen = _Pen()
    pen.label("tokens", 26, _MIDDLE + 4)
    pen.x = 52
    pen.step("embed", "plain", note=f"× {cfg.embed_scale:.4g}" if cfg.embed_scale != 1 else "")
    if inner is None:
        if cfg.n_prelude:
            pen.stack("prelude", cfg.n_prelude)
        _loop(pen, cfg, loops)
        words = f"{cfg.n_prelude} prelude, {cfg.n_core} core layers run {loops} times, {cfg.n_coda} coda layers"
    else:
        _two_stacks(pen, cfg, loops, inner)
        fast, slow = cfg.looping
        words = f"{loops} loops, each {inner} times {fast} and once {slow}, of {cfg.n_core} layers"
    if cfg.norms_last_loop:
        pen.step("norm", "norm")
    if cfg.n_coda:
        pen.stack("coda", cfg.n_coda)
    if cfg.final_norm:
        pen.step("norm", "norm")
    pen.step("head", "plain")
    pen.arrow(pen.x, _MIDDLE, pen.x + _GAP, _MIDDLE)
    pen.label("logits", pen.x + _GAP + 24, _MIDDLE + 4)
    return pen.svg(pen.x + _GAP + 52, f"Schedule: {words}.")


def _two_stacks(pen: _Pen, cfg: LoopedConfig, loops: int, inner: int) -> None:
    """Two stacks in a loop: the one that runs several times, then the one whose state the head reads."""
    before, left = pen.x, pen.x + _GAP
    pen.x = left
    pen.arrow(before, _MIDDLE, left + _GAP, _MIDDLE)
    for name, times in zip(cfg.looping, (f"{inner} times in a loop", "once in a loop"), strict=True):
        pen.stack("core", cfg.n_core, title=name)
        pen.label(times, pen.x - 42, _MIDDLE + 66, small=True)
    pen.way_back(pen.x + 24, left + 12, _MIDDLE - 1, "both states")
    pen.frame(left, pen.x + 42, loops)


def _loop(pen: _Pen, cfg: LoopedConfig, loops: int) -> None:
    """The core with injection, the norm that closes a loop, the exit gate, and the way back."""
    mixed = cfg.reads_input_in_loops
    before, frame_left = pen.x, pen.x + _GAP
    entry = frame_left + 24  # where the state comes in: from the last loop, or at first the initial state
    pen.x = entry - _GAP
    if mixed:
        pen.step(cfg.mix, "plain", arrow=False)
        back, top = entry + 26, _MIDDLE - 20
        pen.label("injection", back + 8, _MIDDLE - 28, small=True, anchor="start")
    else:
        back, top = entry, _MIDDLE
        pen.x = entry - 2
    pen.stack("core", cfg.n_core, arrow=mixed)
    first_box = entry if mixed else entry - 2 + _GAP
    pen.arrow(before, _MIDDLE, first_box, _MIDDLE)
    pen.label("e", before + 14, _MIDDLE - 8, italic=True)
    if cfg.norms_each_loop:
        pen.step("norm", "norm")
    out = max(pen.x + 20, frame_left + 150)  # room for the captions, however small the core
    pen.way_back(out, back, top, "state xₜ₊₁")
    if mixed:
        below = _HEIGHT - 46
        pen.label(f"initial state x₀{cfg.state_mark}", max(back, 160), below + 18)
        pen.line(f"M {back:.1f} {below} V {_MIDDLE + 21}", head=True)
    else:
        pen.label("x₀ = e", entry, _MIDDLE + 22)
    if cfg.exit_gate:
        pen.line(f"M {out:.1f} {_MIDDLE} V {_MIDDLE + 55}", head=True)
        pen.label("exit gate", out - 18, _MIDDLE + 68, small=True)
    pen.frame(frame_left, out + 18, loops)


class _Pen:
    """Draws from left to right; `x` is where the drawing has come to."""

    def __init__(self) -> None:
        self.x: Number = 0
        self.parts: list[str] = []

    def step(self, text: str, kind: str, arrow: bool = True, note: str = "") -> None:
        """A box with a name in it, with a note under it."""
        width = max(44, 9 * len(text) + 12)
        self._advance(arrow)
        self._rect(self.x, _MIDDLE - 20, width, 40, kind)
        self.label(text, self.x + width / 2, _MIDDLE + 4)
        if note:
            self.label(note, self.x + width / 2, _MIDDLE + 36, small=True)
        self.x += width

    def stack(self, name: str, n_layers: int, arrow: bool = True, title: str | None = None) -> None:
        """A box with a strip for each layer; of many, the first three and the last."""
        strips = n_layers if n_layers <= 6 else 5
        width = max(84, 22 * strips + 18)
        self._advance(arrow)
        self._rect(self.x, _MIDDLE - 52, width, 104, name)
        self.label(title or name, self.x + width / 2, _MIDDLE - 34, bold=True)
        left = self.x + (width - 22 * strips) / 2
        for i in range(strips):
            if n_layers > 6 and i == 3:
                self.label("⋯", left + 22 * i + 11, _MIDDLE + 8)
            else:
                self.parts.append(
                    f'<rect x="{left + 22 * i + 3:.1f}" y="{_MIDDLE - 22}" width="16" height="44" rx="3" fill="white" '
                    f'stroke="{_EDGE[name]}"/>'
                )
        self.label(f"{n_layers} layer{'s' if n_layers > 1 else ''}", self.x + width / 2, _MIDDLE + 42, small=True)
        self.x += width

    def _advance(self, arrow: bool) -> None:
        if arrow:
            self.arrow(self.x, _MIDDLE, self.x + _GAP, _MIDDLE)
        self.x += _GAP

    def _rect(self, x: Number, y: Number, width: Number, height: Number, kind: str) -> None:
        self.parts.append(
            f'<rect x="{x:.1f}" y="{y}" width="{width}" height="{height}" rx="6" fill="{_FILL[kind]}" '
            f'stroke="{_EDGE[kind]}"/>'
        )

    def arrow(self, x0: Number, y0: Number, x1: Number, y1: Number) -> None:
        """A straight arrow."""
        self.line(f"M {x0:.1f} {y0:.1f} L {x1 - 1:.1f} {y1:.1f}", head=True)

    def line(self, path: str, head: bool = False, strong: bool = False) -> None:
        """A line along an SVG path, with an arrow head at its end, or strong in the colour of the loop."""
        color, end = ("#D55E00", "loop") if strong else ("#4A545F", "plain")
        marker = f' marker-end="url(#tl-head-{end})"' if head else ""
        self.parts.append(
            f'<path d="{path}" fill="none" stroke="{color}" stroke-width="{2 if strong else 1.5}"{marker}/>'
        )

    def way_back(self, out: Number, back: Number, top: Number, text: str) -> None:
        """The stream goes on to `out`, and from there also over all boxes back to the point (back, top)."""
        over = _MIDDLE - 92
        self.line(f"M {self.x:.1f} {_MIDDLE} H {out + 18:.1f}")
        self.parts.append(f'<circle cx="{out:.1f}" cy="{_MIDDLE}" r="3.5" fill="#4A545F"/>')
        self.line(f"M {out:.1f} {_MIDDLE} V {over} H {back:.1f} V {top - 1}", head=True, strong=True)
        self.label(text, (out + back) / 2, over - 8)

    def frame(self, left: Number, right: Number, loops: int) -> None:
        """A dashed frame around the loop that ends here, behind everything else."""
        self.parts.insert(
            0,
            f'<rect x="{left:.1f}" y="22" width="{right - left:.1f}" height="{_HEIGHT - 78}" rx="10" fill="#FFFBF7" '
            'stroke="#D55E00" stroke-dasharray="5 4"/>',
        )
        self.label(f"one loop, run {loops} times", (left + right) / 2, 42, bold=True)
        self.x = right

    def label(
        self,
        text: str,
        x: Number,
        y: Number,
        small: bool = False,
        bold: bool = False,
        italic: bool = False,
        anchor: str = "middle",
    ) -> None:
        """A text centred at x (or starting there, with the anchor "start"), standing on y."""
        style = f"font-size:{12 if small else 14}px;font-weight:{600 if bold else 400}"
        style += ";font-style:italic" if italic else ""
        place = f'x="{x:.1f}" y="{y}" text-anchor="{anchor}"'
        self.parts.append(f'<text {place} style="{style}">{html.escape(text)}</text>')

    def svg(self, width: Number, title: str) -> str:
        """The whole picture."""
        heads = "".join(
            f'<marker id="tl-head-{name}" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" '
            f'orient="auto"><path d="M0 0 L8 4 L0 8 z" fill="{color}"/></marker>'
            for name, color in (("plain", "#4A545F"), ("loop", "#D55E00"))
        )
        font = html.escape(FONT, quote=True)
        return (
            f'<svg class="tl-schedule" role="img" aria-label="{html.escape(title, quote=True)}" '
            f'viewBox="0 0 {width:.0f} {_HEIGHT}" width="{width:.0f}" height="{_HEIGHT}" fill="{INK}" '
            f'font-family="{font}" xmlns="http://www.w3.org/2000/svg"><defs>{heads}</defs>'
            f'<rect width="100%" height="100%" fill="white"/>{"".join(self.parts)}</svg>'
        )
