"""The still picture that stands where no script runs: to scale, in the figure's words, and beside it in a notebook."""

from __future__ import annotations

import base64
import io
import re
import subprocess
import sys
import xml.etree.ElementTree as ElementTree

import numpy as np
import plotly.graph_objects as go
import plotly.io as pio
import pytest
from PIL import Image
from plotly.subplots import make_subplots

from tl_looped.viz.figure import Figure
from tl_looped.viz.parts import explain_colors
from tl_looped.viz.still import still_svg
from tl_looped.viz.style import LOOP_SCALE, base_layout, curve_axes

SVG, LINK = "{http://www.w3.org/2000/svg}", "{http://www.w3.org/1999/xlink}href"


def drawn(fig: go.Figure) -> ElementTree.Element:
    return ElementTree.fromstring(still_svg(fig))


def words(picture: ElementTree.Element) -> list[str]:
    return ["".join(node.itertext()) for node in picture.iter(f"{SVG}text")]


def styled(picture: ElementTree.Element, kind: str, style: str) -> list[dict[str, str]]:
    """Attributes of the elements of a kind whose style has that in it."""
    return [node.attrib for node in picture.iter(f"{SVG}{kind}") if style in node.attrib.get("style", "")]


def images(picture: ElementTree.Element) -> list[dict[str, str]]:
    return [node.attrib for node in picture.iter(f"{SVG}image")]


def corners(path: str) -> np.ndarray:
    return np.array([float(part) for part in re.findall(r"-?[\d.]+", path)]).reshape(-1, 2)


def line(*, log: bool = False) -> Figure:
    fig = Figure(go.Scatter(x=[0, 1, 2], y=[1.0, None, 100.0], name="<b>one</b>", line={"color": "red"}))
    fig.add_trace(go.Scatter(x=[0, 1, 2], y=[1.0, 10.0, 100.0], mode="markers", name="two"))
    base_layout(fig, height=300, title={"text": "a &lt;title&gt;"})
    curve_axes(fig)
    return fig.update_yaxes(type="log" if log else "linear", title={"text": "metres"})


def test_points_stand_where_the_axis_has_them() -> None:
    picture = drawn(line(log=True))
    a, b, c = (np.array([float(point[at]) for at in "xy"]) for point in styled(picture, "use", "fill: #ff7f0e")[:3])
    assert (b - a)[0] == pytest.approx((c - b)[0], abs=0.01)
    assert (a - b)[1] == pytest.approx((b - c)[1], abs=0.01)  # a decade each
    assert a[1] > c[1]


def test_a_gap_breaks_the_line() -> None:
    fig = Figure(go.Scatter(y=[1, 2, None, 3, 4], mode="lines", line={"color": "red"}))
    (path,) = [found["d"] for found in styled(drawn(fig), "path", "stroke: #ff0000")]
    assert path.count("M") == 2


def test_words_are_those_of_the_figure() -> None:
    found = words(drawn(line()))
    assert {"a <title>", "metres", "one", "two"} <= set(found)
    assert {"0", "50", "100"} & set(found)


def test_a_heatmap_has_its_colours_and_its_bar() -> None:
    cells = go.Heatmap(z=[[0.0, 1.0], [None, 0.5]], colorscale=[[0, "#000000"], [1, "#FFFFFF"]], zmin=0, zmax=1)
    picture = drawn(base_layout(Figure(cells), height=300))
    cells, bar = [Image.open(io.BytesIO(base64.b64decode(node[LINK].partition(",")[2]))) for node in images(picture)]
    pixels = np.array(cells.convert("RGBA"))
    assert pixels[0].tolist() == [[0, 0, 0, 255], [255, 255, 255, 255]]  # the first row, which the picture turns over
    assert pixels[1, 0, 3] == 0 and abs(int(pixels[1, 1, 0]) - 128) <= 1
    assert float(images(picture)[0]["transform"].split()[3]) < 0  # so it is at the bottom
    assert bar.size[0] < bar.size[1]
    assert {"0.0", "1.0"} <= set(words(picture))


def test_cells_have_their_texts_in_ink_that_can_be_read() -> None:
    look = {"colorscale": [[0, "#FFFFFF"], [1, "#000000"]], "texttemplate": "%{text}", "zmin": 0, "zmax": 1}
    picture = drawn(Figure(go.Heatmap(z=[[0.0, 1.0, None]], text=[["pale", "$dark$", None]], **look)))
    inks = {"".join(node.itertext()): node.attrib["style"] for node in picture.iter(f"{SVG}text")}
    assert "#1f2933" in inks["pale"] and "#ffffff" in inks["$dark$"]
    assert "None" not in inks


def test_panels_bars_and_packed_numbers() -> None:
    fig = make_subplots(figure=Figure(), rows=1, cols=2, subplot_titles=["left", "right"])
    fig.add_trace(go.Bar(x=["a", "b"], y=np.array([1.0, 3.0])), row=1, col=1)
    fig.add_trace(go.Histogram(x=[0.1, 0.1, 0.9], xbins={"start": 0, "end": 1, "size": 0.5}), row=1, col=2)
    fig.add_hline(y=2, line={"color": "green"}, row=1, col=1)
    picture = drawn(base_layout(fig, height=300))
    first, second = (
        [np.ptp(corners(bar["d"]), 0)[1] for bar in styled(picture, "path", f"fill: {color}")]
        for color in ("#1f77b4", "#ff7f0e")
    )
    assert first[1] == pytest.approx(3 * first[0], abs=0.01)
    assert second[0] == pytest.approx(2 * second[1], abs=0.01)
    assert len(styled(picture, "path", "stroke: #008000")) == 1
    assert {"left", "right", "a", "b"} <= set(words(picture))


def test_error_bars_end_where_their_numbers_say() -> None:
    errors = {"array": [1.0, 2.0], "arrayminus": [0.0, 2.0], "symmetric": False}
    for mark in (
        go.Scatter(y=[5.0, 5.0], mode="markers", error_y=errors),
        go.Bar(x=["a", "b"], y=[5, 5], error_y=errors),
    ):
        picture = drawn(Figure(mark))
        lines = [corners(node.attrib["d"]) for node in picture.iter(f"{SVG}path") if "clip-path" in node.attrib]
        upright = [np.ptp(line, 0)[1] for line in lines if np.ptp(line, 0)[0] == 0 and len(line) == 2]
        assert upright[-1] == pytest.approx(4 * upright[-2], rel=1e-4)


def test_a_trace_without_points_brings_its_colour_bar() -> None:
    fig = Figure(go.Scatter(y=[1, 2]))
    explain_colors(fig, LOOP_SCALE, 8, "loop of the model")
    assert len(images(drawn(fig))) == 1
    assert {"loop of the model", "0", "8"} <= set(words(drawn(fig)))


def test_notes_and_lines_stand_at_their_number_of_a_logarithmic_axis() -> None:
    fig = Figure(go.Scatter(x=[0, 1], y=[1.0, 1000.0], line={"color": "red"}))
    fig.add_hline(y=100, line={"color": "green"})
    fig.add_annotation(text="hundred", x=0, y=2, yanchor="bottom", showarrow=False)  # plotly takes the logarithm here
    picture = drawn(fig.update_yaxes(type="log"))
    low, high = corners(styled(picture, "path", "stroke: #ff0000")[0]["d"])[:, 1]
    at = corners(styled(picture, "path", "stroke: #008000")[0]["d"])[0, 1]
    assert (at - low) / (high - low) == pytest.approx(2 / 3, abs=1e-4)
    (note,) = [node.attrib for node in picture.iter(f"{SVG}text") if "".join(node.itertext()) == "hundred"]
    assert 0 < at - float(note["y"]) < 8


def test_hostile_words_stay_words() -> None:
    fig = Figure(go.Scatter(y=[1, 2], name="&lt;/svg&gt;&lt;script&gt;x&lt;/script&gt;", showlegend=True))
    assert list(drawn(fig).iter(f"{SVG}script")) == []


def test_the_same_figure_is_the_same_picture_which_says_what_it_is() -> None:
    picture = still_svg(line())
    assert picture == still_svg(line())
    assert {"role": "img", "aria-label": "a <title>"}.items() <= drawn(line()).attrib.items()
    assert "<metadata" not in picture  # with the date


def test_a_picture_says_nothing_twice() -> None:
    fig = Figure(go.Heatmap(z=[[i / 100 for i in range(40)]] * 6, text=[["0.123456"] * 40] * 6, texttemplate="%{text}"))
    picture = still_svg(base_layout(fig, height=300))
    assert len(picture) < 40_000  # notebooks hold many
    assert picture.count("font-family") == 1
    assert words(ElementTree.fromstring(picture)).count("0.123456") == 240  # a number in words keeps its digits


def test_what_is_set_for_other_pictures_does_not_reach_ours() -> None:
    import matplotlib as mpl

    picture = still_svg(line())
    with mpl.rc_context({"text.usetex": True, "figure.facecolor": "black", "font.size": 30}):
        assert still_svg(line()) == picture
        assert mpl.rcParams["font.size"] == 30


def test_words_in_other_scripts_are_kept_without_a_warning() -> None:
    fig = Figure(go.Scatter(y=[1, 2])).update_layout(title={"text": "日本<br>$x$"})
    assert {"日本", "$x$"} <= set(words(drawn(fig)))


def test_importing_figures_does_not_import_what_draws_stills() -> None:
    code = "import sys, tl_looped.viz; print('matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"


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
