"""The still picture that stands where no script runs: to scale, in the figure's words, and beside it in a notebook."""

from __future__ import annotations

import base64
import re
import xml.etree.ElementTree as ElementTree
import zlib

import numpy as np
import plotly.graph_objects as go
import plotly.io as pio
import pytest
from plotly.subplots import make_subplots

from tl_looped.viz.figure import Figure, still_svg
from tl_looped.viz.marks import color_table, data_png
from tl_looped.viz.still import Scale
from tl_looped.viz.style import base_layout, curve_axes

SVG = "{http://www.w3.org/2000/svg}"


def drawn(fig: go.Figure) -> ElementTree.Element:
    return ElementTree.fromstring(still_svg(fig))


def words(picture: ElementTree.Element) -> list[str]:
    return ["".join(node.itertext()) for node in picture.iter(f"{SVG}text")]


def line(*, log: bool = False) -> Figure:
    fig = Figure(go.Scatter(x=[0, 1, 2], y=[1.0, None, 100.0], name="<b>one</b>", line={"color": "red"}))
    fig.add_trace(go.Scatter(x=[0, 1, 2], y=[1.0, 10.0, 100.0], mode="markers", name="two"))
    base_layout(fig, height=300, title={"text": "a &lt;title&gt;"})
    curve_axes(fig)
    return fig.update_yaxes(type="log" if log else "linear", title={"text": "metres"})


def test_points_stand_where_the_axis_has_them() -> None:
    picture = drawn(line(log=True))
    circles = [(float(c.attrib["cx"]), float(c.attrib["cy"])) for c in picture.iter(f"{SVG}circle")]
    (ax, ay), (bx, by), (cx, cy) = circles[2:5]  # of the second trace; the first has a gap
    assert bx - ax == pytest.approx(cx - bx, abs=0.2)
    assert ay - by == pytest.approx(by - cy, abs=0.2)  # a decade each
    assert ay > cy


def test_a_gap_breaks_the_line() -> None:
    fig = Figure(go.Scatter(y=[1, 2, None, 3, 4], mode="lines", line={"color": "red"}))
    (path,) = [p.attrib["d"] for p in drawn(fig).iter(f"{SVG}path") if p.attrib.get("stroke") == "red"]
    assert path.count("M") == 2


def test_words_are_those_of_the_figure() -> None:
    found = words(drawn(line()))
    assert {"a <title>", "metres", "one", "two"} <= set(found)
    assert {"0", "50", "100"} & set(found)


def test_a_heatmap_has_its_colours_and_its_bar() -> None:
    cells = go.Heatmap(z=[[0.0, 1.0], [None, 0.5]], colorscale=[[0, "#000000"], [1, "#FFFFFF"]], zmin=0, zmax=1)
    picture = drawn(base_layout(Figure(cells), height=300))
    images = [node.attrib["href"] for node in picture.iter(f"{SVG}image")]
    assert len(images) == 2
    png = base64.b64decode(images[0].partition(",")[2])
    rows = (
        np.frombuffer(zlib.decompress(png[41 : png.index(b"IEND") - 8]), np.uint8).reshape(2, 9)[:, 1:].reshape(2, 2, 4)
    )
    assert rows[1].tolist() == [[0, 0, 0, 255], [255, 255, 255, 255]]  # the first row is at the bottom
    assert rows[0, 0, 3] == 0 and abs(int(rows[0, 1, 0]) - 128) <= 1
    assert {"0", "1"} <= set(words(picture))


def test_panels_bars_and_packed_numbers() -> None:
    fig = make_subplots(figure=Figure(), rows=1, cols=2, subplot_titles=["left", "right"])
    fig.add_trace(go.Bar(x=["a", "b"], y=np.array([1.0, 3.0])), row=1, col=1)
    fig.add_trace(go.Histogram(x=[0.1, 0.1, 0.9], xbins={"start": 0, "end": 1, "size": 0.5}), row=1, col=2)
    fig.add_hline(y=2, line={"color": "green"}, row=1, col=1)
    picture = drawn(base_layout(fig, height=300))
    rects = [
        r for r in picture.iter(f"{SVG}rect") if float(r.attrib.get("height", "0").rstrip("%")) and "x" in r.attrib
    ]
    heights = [float(r.attrib["height"]) for r in rects if r.attrib["fill"].startswith("rgb")]
    assert heights[1] == pytest.approx(3 * heights[0], abs=0.3)
    assert heights[2] == pytest.approx(2 * heights[3], abs=0.3)
    assert {"left", "right", "a", "b"} <= set(words(picture))


def test_hostile_words_stay_words() -> None:
    fig = Figure(go.Scatter(y=[1, 2], name="&lt;/svg&gt;&lt;script&gt;x&lt;/script&gt;", showlegend=True))
    assert list(drawn(fig).iter(f"{SVG}script")) == []


@pytest.mark.parametrize(
    ("log", "low", "high"), [(False, 0.0, 1.0), (False, -3.2, 7.7), (True, -7.0, 2.0), (True, 0.1, 0.9)]
)
def test_ticks_are_few_round_and_inside(log: bool, low: float, high: float) -> None:
    ticks = Scale(0, 100, low, high, log, [], {}).ticks()
    assert 2 <= len(ticks) <= 12
    assert all(-1e-3 <= at <= 100.001 for at, _ in ticks)
    assert all(len(label) <= 5 for _, label in ticks)


def test_colours_are_plotlys() -> None:
    assert color_table("Viridis")[0].tolist() == [68, 1, 84]
    assert data_png(np.zeros((1, 1, 4))).startswith("data:image/png;base64,iVBOR")


def test_a_notebook_gets_data_and_picture(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pio.renderers, "default", "plotly_mimetype")
    bundle = line()._repr_mimebundle_()
    assert set(bundle) == {"application/vnd.plotly.v1+json", "image/svg+xml"}
    asked = []
    monkeypatch.setattr(pio, "show", lambda fig, *args, **kwargs: asked.append(kwargs["renderer"]))
    line().show()
    line()._ipython_display_()
    assert asked == ["plotly_mimetype+tl_looped_still"] * 2
    monkeypatch.setattr(pio.renderers, "default", "notebook")
    assert set(line()._repr_mimebundle_()) == {"text/html"}
    line().show(renderer="json")
    assert asked[2:] == ["json"]


def test_the_renderer_is_plotlys_to_use() -> None:
    bundle = pio.renderers._build_mime_bundle(line().to_dict(), "tl_looped_still")
    assert re.match("<svg ", bundle["image/svg+xml"])
