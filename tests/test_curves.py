"""Curves in the paper's three groupings: every number at its place, in the colour that says which loop or layer."""

import json
import re
from typing import Any

import plotly.graph_objects as go
import pytest
import torch
from torch import Tensor

from tl_looped.engine.errors import InputError
from tl_looped.engine.schedule import LoopSchedule, Pass
from tl_looped.viz.curves import grouped_curves
from tl_looped.viz.style import layer_colors, loop_colors

SCHEDULE = LoopSchedule.looped(2, 3, 1, 4)
VALUES = torch.arange(float(SCHEDULE.depth)) + 1
NAN = float("nan")


def traces(fig: go.Figure) -> dict[str, dict[str, Any]]:
    """The figure's lines by name, as a page gets them; bands and colour bars have no name."""
    return {one["name"]: one for one in json.loads(fig.to_json())["data"] if one.get("name")}


def layout(fig: go.Figure) -> dict[str, Any]:
    return json.loads(fig.to_json())["layout"]


def color_bars(fig: go.Figure) -> list[dict[str, Any]]:
    data = json.loads(fig.to_json())["data"]
    return [one["marker"] for one in data if "colorbar" in one.get("marker", {})]


def bands(fig: go.Figure) -> list[dict[str, Any]]:
    return [one for one in json.loads(fig.to_json())["data"] if one.get("fill") == "toself"]


def draw(values: Tensor = VALUES, schedule: LoopSchedule = SCHEDULE, group: Any = "depth", **options: Any) -> go.Figure:
    return grouped_curves(values, schedule, group, label="measure", **options)


def notes(fig: go.Figure) -> list[str]:
    return [note["text"] for note in layout(fig).get("annotations", [])]


def test_by_depth_every_layer_call_has_its_value_and_every_pass_its_name():
    fig = draw(unit="nats")
    line = traces(fig)["looped model"]
    assert line["x"] == list(range(SCHEDULE.depth)) and line["y"] == VALUES.tolist()
    assert notes(fig) == ["prelude", "loop 0", "loop 1", "loop 2", "loop 3", "coda"]
    lines = [shape["x0"] for shape in layout(fig)["shapes"]]
    assert lines == [1.5, 4.5, 7.5, 10.5, 13.5]
    assert line["customdata"][0].startswith("prelude layer 0")
    assert line["customdata"][6].startswith("core layer 1 in loop 1, realised depth 6")
    assert layout(fig)["yaxis"]["title"]["text"] == "measure (nats)"


def test_by_loop_a_line_a_loop_later_ones_more_yellow():
    lines = traces(draw(group="loop"))
    assert list(lines) == ["prelude", "loop 0", "loop 1", "loop 2", "loop 3", "coda"]
    assert lines["loop 2"]["y"] == [9, 10, 11] and lines["loop 2"]["x"] == [0, 0.5, 1]
    assert lines["prelude"]["x"] == [0, 1] and lines["prelude"]["y"] == [1, 2]
    assert lines["coda"]["x"] == [0.5]  # a block of one layer
    assert [lines[f"loop {t}"]["line"]["color"] for t in range(4)] == loop_colors(4)
    for name in ("prelude", "coda"):
        channels = [int(lines[name]["line"]["color"][i : i + 2], 16) for i in (1, 3, 5)]
        assert max(channels) - min(channels) < 32  # grey


def test_by_layer_a_line_a_layer_later_ones_greener():
    lines = traces(draw(group="layer"))
    assert list(lines) == ["core layer 0", "core layer 1", "core layer 2"]
    assert lines["core layer 1"]["x"] == [0, 1, 2, 3]
    assert lines["core layer 1"]["y"] == [4, 7, 10, 13]
    assert [line["line"]["color"] for line in lines.values()] == layer_colors(3)


def test_layer_colors_run_from_blue_to_green():
    colors = [[int(part) for part in re.findall(r"\d+", color)] for color in layer_colors(9)]
    assert colors[0][2] > colors[0][1] and colors[-1][1] > colors[-1][2]
    shares = [green / (green + blue) for _, green, blue in colors]
    assert shares == sorted(shares)
    assert len(layer_colors(1)) == 1


def test_nan_and_infinity_are_gaps():
    values = VALUES.clone()
    values[5], values[6] = NAN, float("inf")
    assert traces(draw(values))["looped model"]["y"][4:8] == [5, None, None, 8]
    values[5:8] = NAN
    assert "loop 1" not in traces(draw(values, group="loop"))


@pytest.mark.parametrize("group", ["depth", "loop", "layer"])
def test_a_curve_without_values_is_not_drawn(group: str):
    values = torch.full((SCHEDULE.depth,), NAN)
    with pytest.raises(InputError, match="measure has no finite value.*nothing to draw"):
        draw(values, group=group)


def test_values_in_the_prelude_alone_do_not_make_a_figure_over_loops():
    values = torch.full((SCHEDULE.depth,), NAN)
    values[0] = 1
    for group in ("loop", "layer"):
        with pytest.raises(InputError, match="no finite value in any loop"):
            draw(values, group=group)
    assert traces(draw(values))["looped model"]["y"][0] == 1


def test_a_logarithmic_axis_says_what_it_hides():
    values = VALUES.clone()
    values[4:6] = torch.tensor([0.0, -1.0])
    fig = draw(values, log=True)
    assert traces(fig)["looped model"]["y"][3:7] == [4, None, None, 7]
    assert "2 values of zero or below not shown" in notes(fig)
    assert layout(fig)["yaxis"]["type"] == "log"
    assert not any("not shown" in note for note in notes(draw(log=True)))
    with pytest.raises(InputError, match="measure has no positive value.*pass log=False"):
        draw(torch.zeros(SCHEDULE.depth), log=True)


def test_many_loops_get_a_colour_bar_and_the_ends_a_legend():
    schedule = LoopSchedule.looped(1, 2, 1, 128)
    fig = draw(torch.rand(schedule.depth), schedule, "loop")
    lines = traces(fig)
    assert len(lines) == 130
    assert sorted(name for name, line in lines.items() if line["showlegend"]) == ["coda", "prelude"]
    (bar,) = color_bars(fig)
    assert bar["cmin"] == 0 and bar["cmax"] == 127 and bar["colorbar"]["title"]["text"] == "loop"
    assert len(notes(draw(torch.rand(schedule.depth), schedule))) < 20  # names above the plot do not pile up


def test_many_layers_get_a_colour_bar():
    schedule = LoopSchedule.looped(0, 24, 0, 3)
    fig = draw(torch.rand(schedule.depth), schedule, "layer")
    (bar,) = color_bars(fig)
    assert bar["cmax"] == 23 and bar["colorbar"]["title"]["text"] == "core layer"
    assert not any(line["showlegend"] for line in traces(fig).values())
    assert color_bars(draw(group="layer")) == []


def test_nested_stacks_keep_their_names():
    schedule = LoopSchedule.nested(2, 2, 2)
    values = torch.arange(float(schedule.depth))
    by_loop = traces(draw(values, schedule, "loop"))
    assert list(by_loop) == [
        "L_blocks loop 0",
        "L_blocks loop 1",
        "H_blocks loop 0",
        "L_blocks loop 2",
        "L_blocks loop 3",
        "H_blocks loop 1",
    ]
    assert by_loop["L_blocks loop 2"]["y"] == [6, 7]
    by_layer = traces(draw(values, schedule, "layer"))
    assert by_layer["H_blocks layer 1"]["x"] == [0, 1] and by_layer["H_blocks layer 1"]["y"] == [5, 11]
    assert by_layer["H_blocks layer 1"]["line"]["dash"] != by_layer["L_blocks layer 1"]["line"]["dash"]


def test_a_band_is_drawn_around_every_stretch_and_told_in_words():
    low, high = VALUES - 0.5, VALUES + 0.25
    low[6] = NAN
    fig = draw(band=(low, high), band_name="quartiles")
    first, second = bands(fig)
    assert first["x"] == [0, 1, 2, 3, 4, 5, 5, 4, 3, 2, 1, 0]
    assert first["y"][0] == 0.5 and first["y"][-1] == 1.25
    assert min(second["x"]) == 7
    texts = traces(fig)["looped model"]["customdata"]
    assert "quartiles: 3.5 to 4.25" in texts[3] and "quartiles: – to 7.25" in texts[6]


def test_bands_of_many_lines_are_only_told_in_words():
    schedule = LoopSchedule.looped(0, 2, 0, 9)
    values = torch.rand(schedule.depth)
    fig = draw(values, schedule, "loop", band=(values, values + 1))
    assert bands(fig) == [] and "band: " in traces(fig)["loop 3"]["customdata"][0]
    assert len(bands(draw(values, schedule, "layer", band=(values, values + 1)))) == 2


def test_a_feedforward_model_is_drawn_over_its_own_depth():
    reference = torch.tensor([3.0, NAN, 1.0])
    by_loop = traces(draw(group="loop", reference=reference, reference_name="control <b>"))
    assert by_loop["control &lt;b&gt;"]["x"] == [0, 0.5, 1] and by_loop["control &lt;b&gt;"]["y"] == [3, None, 1]
    by_depth = traces(draw(reference=reference))
    assert by_depth["feedforward model"]["x"] == [0, 1, 2]
    assert by_depth["looped model"]["showlegend"]
    assert traces(draw(group="loop", reference=torch.ones(1)))["feedforward model"]["x"] == [0.5]


def test_a_feedforward_model_has_one_grouping():
    schedule = LoopSchedule((Pass("blocks", 3, None),))
    fig = draw(torch.tensor([1.0, 2.0, 4.0]), schedule)
    assert traces(fig)["looped model"]["y"] == [1, 2, 4] and notes(fig) == []
    assert traces(fig)["looped model"]["customdata"][1] == "layer 1, realised depth 1"
    with pytest.raises(InputError, match=r"no loops \(blocks 3\): pass group='depth'"):
        draw(torch.ones(3), schedule, "loop")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"values": VALUES[:-1]}, r"each of the 15 layer calls of prelude 2.*got shape \(14,\).*cfg.schedule"),
        ({"band": (VALUES, VALUES[1:])}, "band must hold one number"),
        ({"group": "time"}, "group must be one of.*'time'"),
        ({"group": "layer", "reference": VALUES}, "no loops: pass group='loop' or 'depth'"),
        ({"reference": torch.tensor([NAN])}, "reference has no finite value"),
    ],
)
@pytest.mark.usefixtures("as_a_user")
def test_what_can_not_be_drawn(options: dict[str, Any], message: str):
    with pytest.raises(InputError, match=message):
        draw(**options)
