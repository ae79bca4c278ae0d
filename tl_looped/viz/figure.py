"""Our figures: plotly's, which bring a still picture for readers whose notebook runs no script."""

from __future__ import annotations

from typing import Any

import plotly.graph_objects as go
import plotly.io as pio
from plotly.io.base_renderers import MimetypeRenderer, PlotlyRenderer

from tl_looped.viz.still import still_svg

_SVG = "image/svg+xml"
_STILL = "tl_looped_still"  # our renderer's name; it is never plotly's default


class Figure(go.Figure):
    """A plotly figure whose notebook output has a still picture beside it.

    JupyterLab and VS Code draw the figure itself; GitHub, exported pages and anything else that runs no script show the
    picture. Where plotly's renderer brings HTML of its own (Colab), that is left alone.
    """

    def still_svg(self) -> str:
        """The figure as an SVG picture, drawn without a browser."""
        return still_svg(self)

    def _repr_mimebundle_(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        bundle = super()._repr_mimebundle_(*args, **kwargs)
        return {**bundle, _SVG: self.still_svg()} if _draws_itself() else bundle

    def _ipython_display_(self) -> None:
        self.show() if pio.renderers.render_on_display and pio.renderers.default else print(repr(self))

    def show(self, *args: Any, **kwargs: Any) -> None:
        """Show it as plotly does: under a notebook's cell, there with a still picture, or in a browser."""
        if not args and "renderer" not in kwargs and _draws_itself():
            kwargs["renderer"] = f"{pio.renderers.default}+{_STILL}"
        super().show(*args, **kwargs)


def _draws_itself() -> bool:
    """Whether figures go to the notebook as data, which only some readers of it can draw."""
    names = (pio.renderers.default or "").split("+")
    return all(getattr(pio.renderers[name], "__class__", None) is PlotlyRenderer for name in names if name)


class _StillRenderer(MimetypeRenderer):
    """For plotly: the still picture, beside what other renderers bring."""

    def to_mimebundle(self, fig_dict: dict[str, Any]) -> dict[str, str]:
        return {_SVG: still_svg(go.Figure(fig_dict))}


pio.renderers[_STILL] = _StillRenderer()
