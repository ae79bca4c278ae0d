"""Figures from tensors: the right numbers in the right place, under readable and harmless labels."""

import base64
import html
import json
import re
import sys
import xml.etree.ElementTree as ElementTree
import zlib
from types import SimpleNamespace

import plotly.graph_objects as go
import pytest
import torch
from circuitsvis.utils.render import RenderedHTML
from helpers import config, tiny, tokens_for

from tl_looped import InputError, viz
from tl_looped.viz import browser
from tl_looped.viz.readout import readout_curves, readout_heatmap
from tl_looped.viz.state import state_convergence, step_by_position
from tl_looped.viz.style import (
    data_block,
    loop_axis,
    loop_colors,
    numbers,
    plotly_text,
    shorten,
    show_token,
    token_axis,
)

TOKENS = ["<bos>", " a", "</script>", "\n"]


def probabilities(*shape: int) -> torch.Tensor:
    """Random numbers that sum to one along the last axis, the highest first."""
    drawn = torch.rand(*shape, generator=torch.Generator().manual_seed(5)).softmax(-1)
    return drawn.sort(-1, descending=True).values


def trace(fig: go.Figure, index: int = 0) -> dict:
    """A trace as the page gets it."""
    return json.loads(fig.to_json())["data"][index]


def layout(fig: go.Figure) -> dict:
    """The layout as the page gets it."""
    return json.loads(fig.to_json())["layout"]


def attention(n_layers: int = 1, n_heads: int = 2, n_loops: int = 3) -> list[viz.LayerAttention]:
    patterns = torch.rand(n_layers, n_loops, n_heads, 4, 4, generator=torch.Generator().manual_seed(6)).tril()
    patterns = patterns / patterns.sum(-1, keepdim=True)
    return [viz.LayerAttention("blocks", i, tuple(range(n_loops)), patterns[i]) for i in range(n_layers)]


def test_loop_colors_run_from_green_to_yellow():
    colors = [[int(part) for part in re.findall(r"\d+", color)] for color in loop_colors(5)]
    reds, greens = [color[0] for color in colors], [color[1] for color in colors]
    assert reds == sorted(reds)  # more red in green is more yellow
    assert greens == sorted(greens)
    assert all(color[2] < color[1] for color in colors)
    assert len(loop_colors(1)) == 1


@pytest.mark.parametrize(
    ("token", "shown"),
    [(" a", "·a"), ("a ", "a·"), ("  ", "··"), ("a b", "a b"), ("\n", "⏎"), (" \t", "·⇥"), ("\x00", "\\x00"), ("", "")],
)
def test_white_space_of_a_token_shows(token: str, shown: str):
    assert show_token(token) == shown


def test_plotly_text_has_no_tags():
    assert plotly_text("<b>&") == "&lt;b&gt;&amp;"


def test_data_block_can_not_be_closed_by_its_text():
    hostile = {"text": "</script><!--<script>alert(1)</script>\u2028"}
    block = data_block(hostile)
    assert block.count("<") == 2
    inside = re.fullmatch(r'<script type="application/json">(.*)</script>', block, re.DOTALL)
    assert inside
    assert json.loads(inside[1]) == hostile


def test_numbers_turn_what_is_not_finite_into_a_gap():
    assert numbers(torch.tensor([[1.0, float("nan")], [float("inf"), 0.123456789]])) == [[1.0, None], [None, 0.12346]]


def test_shorten():
    assert [shorten("abcdefgh", n) for n in (8, 5, 3)] == ["abcdefgh", "abcd…", "abc"]


@pytest.mark.parametrize("n_loops", [1, 2, 6, 13, 32, 128, 1000])
def test_loop_axis_has_few_whole_ticks(n_loops: int):
    step = loop_axis(n_loops)["dtick"]
    assert isinstance(step, int)
    assert -(-n_loops // step) <= 16


def test_token_axis_turns_labels_that_would_touch():
    assert token_axis(["a"] * 40)["tickangle"] == 0
    assert token_axis(["alphabet"] * 40)["tickangle"] == -60
    assert len(token_axis(["a"] * 500)["ticktext"]) <= 64


def test_readout_heatmap_shows_probability_and_top_token():
    probs = probabilities(3, 4, 5)
    names = [[[f"t{t}p{j}k{k}" for k in range(5)] for j in range(4)] for t in range(3)]
    names[1][2][0] = "<img src=x>"
    fig = readout_heatmap(probs, names, TOKENS, positions=range(7, 11))
    cells = trace(fig)
    torch.testing.assert_close(torch.tensor(cells["z"]), probs[..., 0], atol=1e-5, rtol=1e-4)
    assert cells["text"][0][3] == "t0p3k0"
    assert cells["text"][1][2] == "&lt;img src=x&gt;"
    assert cells["x"] == [0, 1, 2, 3]
    assert cells["customdata"][2][1][0] == "position 8, reads ·a<br>after loop 2:"
    assert all(f"t2p1k{k}" in cells["customdata"][2][1][1] for k in range(5))
    axis = layout(fig)["xaxis"]
    assert axis["tickvals"] == [0, 1, 2, 3]
    assert axis["ticktext"] == ["&lt;bos&gt;", "·a", "&lt;/script&gt;", "⏎"]
    assert layout(fig)["yaxis"]["title"]["text"] == "after loop"


@pytest.mark.parametrize(("n_loops", "n_positions", "written"), [(3, 4, True), (64, 4, False), (3, 64, False)])
def test_readout_heatmap_writes_tokens_where_there_is_room(n_loops: int, n_positions: int, written: bool):
    names = [[["word"] for _ in range(n_positions)] for _ in range(n_loops)]
    fig = readout_heatmap(torch.rand(n_loops, n_positions, 1), names, ["a"] * n_positions)
    assert ("text" in trace(fig)) == written


def test_readout_curves_have_units():
    prob, rank = torch.tensor([0.1, 0.9]), torch.tensor([11, 0])
    fig = readout_curves(prob, rank, torch.tensor([1.5, 0.2]), torch.tensor([2.0, 0.0]), "<4>")
    assert [trace(fig, i)["customdata"] for i in range(4)] == [[0.1, 0.9], [11, 0], [1.5, 0.2], [2.0, 0.0]]
    titles = [layout(fig)[axis]["title"]["text"] for axis in ("yaxis", "yaxis2", "yaxis3")]
    assert titles == ["probability", "rank (log scale)", "nats"]
    assert layout(fig)["annotations"][0]["text"] == "Probability of &lt;4&gt;"
    low, high = layout(fig)["yaxis2"]["range"]
    assert low > high  # rank 0 at the top


def test_state_convergence_marks_the_last_position_and_the_median():
    step = torch.tensor([[1.0, 2.0, 3.0], [0.1, 0.2, 0.6]])
    fig = state_convergence(step, step - 1, ["a", "b", "c"])
    lines = {(one["name"], one.get("xaxis", "x")): one["y"] for one in json.loads(fig.to_json())["data"]}
    assert lines["last position", "x"] == [3.0, 0.6]
    assert lines["median over positions", "x"] == [2.0, 0.2]
    assert lines["last position", "x2"] == [2.0, -0.4]
    assert layout(fig)["yaxis"]["type"] == "log"


def test_step_by_position_has_a_line_for_each_loop():
    step = torch.rand(4, 3)
    fig = step_by_position(step, ["a", "b", "c"])
    lines = [one for one in json.loads(fig.to_json())["data"] if one["mode"] == "lines+markers"]
    torch.testing.assert_close(torch.tensor([one["y"] for one in lines]), step, atol=1e-4, rtol=1e-4)
    assert [one["line"]["color"] for one in lines] == loop_colors(4)


def test_attention_from_position_has_a_panel_for_each_head():
    (layer,) = attention()
    fig = viz.attention_from_position([layer], ["a", "b", "c", "d"])
    for head in range(2):
        torch.testing.assert_close(
            torch.tensor(trace(fig, head)["z"]), layer.pattern[:, head, -1], atol=1e-4, rtol=1e-4
        )
    assert [one["text"] for one in layout(fig)["annotations"]] == ["core layer 0, head 0", "core layer 0, head 1"]


def test_attention_from_position_takes_means_of_many_heads():
    layers = attention(n_layers=24, n_heads=6)
    fig = viz.attention_from_position(layers, ["a", "b", "c", "d"], position=2)
    titles = [one["text"] for one in layout(fig)["annotations"]]
    assert titles == [f"core layer {layer}, mean of 6 heads" for layer in range(0, 24, 3)]
    mean = layers[3].pattern[:, :, 2].mean(1)
    torch.testing.assert_close(torch.tensor(trace(fig, 1)["z"]), mean, atol=1e-4, rtol=1e-4)


def test_attention_heads_is_circuitsvis():
    shown = viz.attention_heads(attention()[0].pattern[0], TOKENS, "loop 0")
    assert isinstance(shown, RenderedHTML)
    assert "loop 0 head 1" in shown.local_src


def test_loop_attention_holds_every_loop_and_no_code():
    view = viz.LoopAttention(TOKENS, attention(), start=0)
    fragment = view.fragment()
    data = json.loads(re.search(r">(\{.*\})<", fragment)[1])
    assert data["tokens"] == ["<bos>", "·a", "</script>", "⏎"]
    assert data["layers"][0]["loops"] == [0, 1, 2]
    levels = zlib.decompress(base64.b64decode(data["layers"][0]["pattern"]))
    kept = torch.tensor(list(levels)).reshape(3, data["layers"][0]["heads"], 4, 4) / 255
    torch.testing.assert_close(kept, attention()[0].pattern, atol=0.5 / 255 + 1e-6, rtol=0)
    assert fragment.lower().count("<script") == 1  # its data


def test_loop_attention_stands_alone_in_a_notebook():
    shown = viz.LoopAttention(TOKENS, attention())._repr_html_()
    assert shown.count("</script") == 2  # of its data and of its code, and none inside
    code = zlib.decompress(base64.b64decode(re.search(r'atob\("([^"]+)"', shown)[1])).decode()
    assert "CircuitsVis.render" in code
    assert "unpkg" not in shown + code
    assert len(shown) < 600_000
    picture = ElementTree.fromstring(base64.b64decode(re.search(r'svg\+xml;base64,([^"]+)"', shown)[1]))
    assert "core layer 0: where the last position looks" in picture.attrib["aria-label"]


def test_the_code_comes_once_in_a_notebook_and_again_when_its_cell_runs_again(monkeypatch: pytest.MonkeyPatch):
    parent: dict = {}
    shell = SimpleNamespace(get_parent=lambda: parent)
    monkeypatch.setitem(sys.modules, "IPython", SimpleNamespace(get_ipython=lambda: shell))
    monkeypatch.setattr(browser, "_host", None)

    def brings(run: str, cell: str) -> bool:
        parent.update(header={"msg_id": run}, metadata={"cellId": cell})
        return "atob" in viz.LoopAttention(TOKENS, attention())._repr_html_()

    shown = [("1", "a"), ("1", "a"), ("2", "b"), ("3", "a"), ("4", "b")]
    assert [brings(*one) for one in shown] == [True, False, False, True, False]


def test_attention_of_a_cache():
    model = tiny("huginn")
    _, cache = model.run_with_cache(tokens_for(model, pos=4), 3)
    view = viz.LoopAttention.of(cache, TOKENS)
    assert {layer.name for layer in view.layers} >= {"prelude layer 0", "core layer 0"}
    core = view.layers[view.start]
    assert (core.name, core.loops) == ("core layer 0", (0, 1, 2))
    assert torch.equal(core.pattern[2], cache["pattern", 0, 2][0])
    with pytest.raises(InputError, match=r"patterns are over 4 x 4 positions, but 3 tokens were given"):
        viz.LoopAttention.of(cache, TOKENS[:3])
    _, other = model.run_with_cache(tokens_for(model, pos=4), names_filter="hook_embed")
    with pytest.raises(InputError, match=r"no attention pattern: make it without names_filter"):
        viz.LoopAttention.of(other, TOKENS)
    alone = viz.LoopAttention(TOKENS, [view.layers[0]])
    assert "prelude layer 0" in alone._repr_html_()


def test_layer_attention_names():
    pattern = torch.ones(1, 1, 1, 1)
    names = [viz.LayerAttention(stack, 3, (None,), pattern).name for stack in ("prelude", "blocks", "coda")]
    assert names == ["prelude layer 3", "core layer 3", "coda layer 3"]


@pytest.mark.parametrize(
    ("changes", "there", "absent"),
    [
        ({"n_prelude": 1, "injection": "concat_linear"}, ["prelude", "W [x; e]", "injection"], ["coda", "exit gate"]),
        ({"n_coda": 2, "injection": "add", "state_init": "zeros"}, ["coda", "x + e", "= 0"], ["prelude"]),
        ({"exit_gate": True, "loop_norm": "each", "final_norm": False}, ["exit gate", "x₀ = e", "norm"], ["injection"]),
        (
            {"state_init": "truncated_normal", "injection": "add", "n_core": 24},
            ["random (truncated normal)", "24 layers", "⋯"],
            [],
        ),
        ({"final_norm": False}, ["head"], ["norm"]),
        ({"embed_scale": 8.0, "loop_norm": "last"}, ["× 8", "norm"], []),
    ],
)
def test_schedule_drawing_names_its_parts(changes: dict, there: list[str], absent: list[str]):
    drawing = viz.schedule_svg(config(**changes), n_loops=7)
    texts = [node.text for node in ElementTree.fromstring(drawing).iter("{http://www.w3.org/2000/svg}text")]
    whole = " | ".join(text for text in texts if text)
    assert "one loop, run 7 times" in whole
    assert [part for part in there if part not in whole] == []
    assert [part for part in absent if part in whole] == []


def test_schedule_drawing_says_what_it_shows():
    drawing = ElementTree.fromstring(viz.schedule_svg(config(n_prelude=2)))
    ground = next(node for node in drawing if node.tag.endswith("rect"))
    assert ground.attrib == {"width": "100%", "height": "100%", "fill": "white"}  # a dark page does not show through
    assert html.unescape(drawing.attrib["aria-label"]) == (
        "Schedule: 2 prelude, 2 core layers run 2 times, 0 coda layers."
    )
