"""Entropy, KL and rank against closed forms and other code; what a result makes of constructed read-outs."""

from __future__ import annotations

import math
from typing import Any

import pandas as pd
import pytest
import torch
from torch import Tensor
from torch.distributions import Categorical
from torch.distributions import kl_divergence as distributions_kl

from tl_looped import InputError
from tl_looped.engine.numbers import log_probs_of
from tl_looped.lens import LogitLens
from tl_looped.lens.measures import entropy, kl_divergence, token_rank, top_ids

NAN, INF = float("nan"), float("inf")
HUGE = [1e4, 0.0, -1e4, 3.0]

# Measures.


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("scale", [0.01, 1.0, 30.0])
def test_kl_and_entropy_are_those_of_torch_distributions(dtype: torch.dtype, scale: float) -> None:
    p, q = (scale * torch.randn(2, 3, 5, 50, dtype=torch.float64)).to(dtype).log_softmax(-1)
    exact = distributions_kl(Categorical(logits=p.double()), Categorical(logits=q.double()))
    found = kl_divergence(p, q)
    assert found.shape == (3, 5) and found.dtype == dtype
    torch.testing.assert_close(found.double(), exact, atol=1e-9, rtol=1e-4)
    wanted = Categorical(logits=p.double()).entropy()
    torch.testing.assert_close(entropy(p).double(), wanted, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_first_top_token_is_argmax_also_among_equals(dtype: torch.dtype) -> None:
    scores = torch.randint(0, 4, (50, 3, 200)).to(dtype)
    found = top_ids(scores, 5)
    assert torch.equal(found[..., 0], scores.argmax(-1))
    assert torch.equal(scores.gather(-1, found), scores.topk(5).values)
    assert all(len(set(row)) == 5 for row in found.flatten(0, 1).tolist())


def test_kl_of_nearly_equal_read_outs_is_not_rounding() -> None:
    """To a part in a thousand where the plain sum in float32 has no right digit, and may be below zero."""
    p = torch.randn(20, 5000, dtype=torch.float64)
    q = p + 1e-4 * torch.randn(20, 5000, dtype=torch.float64)
    p, q = (x.float().log_softmax(-1) for x in (p, q))
    exact = distributions_kl(Categorical(logits=p.double()), Categorical(logits=q.double()))
    plain = (p.exp() * (p - q)).sum(-1)
    assert float(((plain.double() - exact) / exact).abs().max()) > 1
    torch.testing.assert_close(kl_divergence(p, q).double(), exact, atol=0, rtol=1e-3)
    assert torch.equal(kl_divergence(p, p), torch.zeros(20))


def test_closed_forms() -> None:
    uniform, certain = torch.zeros(8).log_softmax(-1), torch.tensor([0.0] + [-INF] * 7)
    half = torch.tensor([0.5, 0.5] + [0.0] * 6).log()
    assert float(entropy(uniform)) == pytest.approx(math.log(8))
    assert float(entropy(certain)) == 0
    assert float(kl_divergence(certain, uniform)) == pytest.approx(math.log(8))
    assert float(kl_divergence(half, uniform)) == pytest.approx(math.log(4))
    assert float(kl_divergence(uniform, half)) == INF
    assert float(kl_divergence(certain, half)) == pytest.approx(math.log(2))
    assert float(kl_divergence(half, half)) == 0
    assert bool(kl_divergence(torch.full((8,), NAN), uniform).isnan())
    assert bool(entropy(torch.full((8,), NAN)).isnan())


@pytest.mark.parametrize(
    ("p", "q"),
    [
        (HUGE, [0.0, 1.0, 2.0, 3.0]),
        ([0.0, 1.0, 2.0, 3.0], [3.0, 2.0, 1.0, 0.0]),
        (HUGE, HUGE),
        ([0.0, -INF, 1.0, -INF], [0.0, 1.0, 2.0, -INF]),  # a masked vocabulary, and more of it masked in p
        ([0.0, -INF, 1.0, 2.0], [0.0, -INF, 1.5, 2.0]),
        ([88.0, -88.0, 0.0, 0.0], [-88.0, -88.0, 0.0, 0.0]),
    ],
)
def test_extreme_logits_have_finite_values_and_gradients(p: list[float], q: list[float]) -> None:
    first, second = (torch.tensor(x, requires_grad=True) for x in (p, q))
    logs = log_probs_of(first), log_probs_of(second)
    wide = [torch.tensor(x, dtype=torch.float64).log_softmax(-1) for x in (p, q)]
    terms = [math.exp(a) * (a - b) for a, b in zip(*(x.tolist() for x in wide), strict=True) if a > -INF]
    kl = kl_divergence(*logs)
    assert kl.item() == pytest.approx(sum(terms), abs=1e-7, rel=1e-5)
    total = kl + entropy(logs[0]) + entropy(logs[1])
    assert bool(total.isfinite())
    gradients = torch.autograd.grad(total, (first, second))
    assert all(bool(gradient.isfinite().all()) for gradient in gradients)


def test_the_gradient_of_kl_is_that_of_softmax() -> None:
    """∂KL(p ‖ softmax(z)) / ∂z = softmax(z) − p, on both sides of the switch between its two sums."""
    p, z = torch.tensor([5.0, 0.1, -3.0, 0.3]).log_softmax(-1), torch.tensor([0.2, 0.1, 0.3, 0.0], requires_grad=True)
    (gradient,) = torch.autograd.grad(kl_divergence(p, log_probs_of(z)), z)
    torch.testing.assert_close(gradient, z.detach().softmax(-1) - p.exp())


def test_log_probabilities_are_float32_at_least() -> None:
    assert log_probs_of(torch.randn(3).bfloat16()).dtype == torch.float32
    assert log_probs_of(torch.randn(3).double()).dtype == torch.float64


def test_ranks_count_from_zero_and_ties_are_not_counted_against_a_token() -> None:
    scores = torch.tensor([[3.0, 1.0, 3.0, 2.0], [0.0, 0.0, 0.0, 0.0]])
    assert token_rank(scores, torch.arange(4).expand(2, 4)).tolist() == [[0, 3, 0, 2], [0, 0, 0, 0]]
    assert token_rank(scores[:, None], torch.tensor([[[1]], [[2]]])).tolist() == [[[3]], [[0]]]


def test_among_scores_that_are_not_numbers_nothing_is_on_top() -> None:
    scores = torch.tensor([[NAN, NAN, NAN], [1.0, NAN, 0.0]])
    ranks = token_rank(scores, torch.arange(3).expand(2, 3))
    assert ranks[0].tolist() == [3, 3, 3]
    assert ranks[1].tolist() == [1, 3, 2]


# A result.


def constructed(tops: list[list[int]], ranks: list[list[int]], is_real: list[bool], **changes: Any) -> LogitLens:
    """A result on the state with these top tokens and target ranks, [loop][pos]; its numbers say where they are."""
    top, rank = torch.tensor(tops)[:, None, :, None], torch.tensor(ranks)[:, None, :, None]
    n_loops, n_pos = len(tops), len(is_real)
    places = torch.arange(n_loops)[:, None, None] + torch.arange(n_pos) / 10
    content = {
        "made_by": {"model": "constructed"},
        "site": "state",
        "loops": tuple(range(n_loops)),
        "layers": None,
        "positions": tuple(range(n_pos)),
        "tokens": torch.arange(n_pos)[None],
        "real": torch.tensor([is_real]),
        "target_ids": torch.full((1, n_pos, 1), 3),
        "target_names": ("d",),
        "texts": {str(i): "abcdefghij"[i] for i in range(10)},
        "top_probs": places[..., None] / 100,
        "top_ids": top,
        "entropy": places,
        "kl_to_final": places + 100,
        "kl_to_previous": places + 200,
        "target_probs": places[..., None] / 50,
        "target_ranks": rank,
    }
    return LogitLens(**{**content, **changes})


FLIPS = constructed(
    tops=[[1, 3, 5, 9], [2, 3, 6, 8], [1, 3, 7, 9], [1, 3, 3, 8]],
    ranks=[[4, 0, 0, 0], [0, 0, 2, 0], [3, 0, 0, 0], [0, 0, 0, 0]],
    is_real=[True, True, True, False],
)


def test_flips_say_where_the_top_token_changes_and_whether_it_came_back() -> None:
    wanted = pd.DataFrame(
        [
            (0, 0, 1, "b", "c", True),
            (0, 2, 1, "f", "g", False),
            (0, 0, 2, "c", "b", False),
            (0, 2, 2, "g", "h", False),
            (0, 2, 3, "h", "d", False),
        ],
        columns=["batch", "pos", "loop", "before", "after", "came_back"],
    )
    pd.testing.assert_frame_equal(FLIPS.answer_flips(), wanted)


def test_flips_are_between_the_loops_read_in_order_of_loops() -> None:
    some = constructed(
        [[4], [1], [2]], [[0]] * 3, [True], loops=(8, 0, 3), positions=(5,), tokens=torch.arange(6)[None]
    )
    assert some.answer_flips().to_dict("records") == [
        {"batch": 0, "pos": 5, "loop": 3, "before": "b", "after": "c", "came_back": False},
        {"batch": 0, "pos": 5, "loop": 8, "before": "c", "after": "e", "came_back": False},
    ]
    still = constructed([[1], [1]], [[0], [0]], [True]).answer_flips()
    assert len(still) == 0 and list(still.columns) == ["batch", "pos", "loop", "before", "after", "came_back"]


def test_the_first_loop_at_which_the_target_is_right() -> None:
    assert FLIPS.first_loop_correct().tolist()[0][:3] == [1.0, 0.0, 0.0]
    assert FLIPS.first_loop_correct("d", stays=True).tolist()[0][:3] == [3.0, 0.0, 2.0]
    assert bool(FLIPS.first_loop_correct()[0, 3].isnan())  # padding
    never = constructed([[1], [1]], [[2], [1]], [True])
    assert bool(never.first_loop_correct().isnan().all()) and bool(never.first_loop_correct(stays=True).isnan().all())
    lost = constructed([[3], [1]], [[0], [1]], [True])
    assert lost.first_loop_correct().tolist() == [[0.0]]
    assert bool(lost.first_loop_correct(stays=True).isnan().all())
    mixed = constructed([[1]] * 3, [[0], [1], [0]], [True], loops=(9, 0, 4))  # as asked for: 9, 0, 4
    assert mixed.first_loop_correct().tolist() == [[4.0]]


def layered() -> LogitLens:
    """Two loops, three layers, two prompts, one position, two targets; every number says where it is."""
    shape = (2, 3, 2, 1)
    count = torch.arange(12.0).reshape(shape)
    return constructed(
        [[0]],
        [[0]],
        [True],
        site="resid_post",
        loops=(1, 4),
        layers=(0, 5, 6),
        positions=(1,),
        tokens=torch.tensor([[8, 9], [9, 8]]),
        real=torch.tensor([[True], [True]]),
        target_ids=torch.tensor([3, 4]).expand(2, 1, 2),
        target_names=("d", "id 4"),
        top_probs=torch.stack([count / 20, count / 40], -1),
        top_ids=torch.stack([count.long() % 3, count.long() % 3 + 1], -1),
        entropy=count,
        kl_to_final=count + 100,
        kl_to_previous=torch.where(torch.arange(2)[:, None, None, None] == 0, NAN, count),
        target_probs=torch.stack([count / 50, count / 60], -1),
        target_ranks=torch.stack([count.long(), 11 - count.long()], -1),
    )


def test_the_table_has_a_row_for_every_real_place() -> None:
    table = FLIPS.to_dataframe()
    assert len(table) == 4 * 3 and set(table["pos"]) == {0, 1, 2}
    row = table[(table["loop"] == 2) & (table["pos"] == 2)].iloc[0].to_dict()
    numbers = {name: row.pop(name) for name in ("top_prob", "entropy", "kl_to_final", "kl_to_previous", "target_prob")}
    assert row == {
        "loop": 2, "batch": 0, "pos": 2, "token": "c", "top_token": "h", "target": "d", "target_rank": 0,
    }  # fmt: skip
    assert list(numbers.values()) == pytest.approx([0.022, 2.2, 102.2, 202.2, 0.044])


def test_the_table_of_layers_and_several_targets() -> None:
    result = layered()
    table = result.to_dataframe()
    assert len(table) == 12
    row = table[(table["loop"] == 4) & (table["layer"] == 5) & (table["batch"] == 1)].iloc[0]
    assert (row["entropy"], row["kl_to_final"], row["kl_to_previous"]) == (9.0, 109.0, 9.0)
    assert (row["token"], row["pos"], row["top_token"]) == ("i", 1, "a")
    assert (row["target[d]"], row["target_rank[d]"], row["target[id 4]"], row["target_rank[id 4]"]) == ("d", 9, "e", 2)
    assert row["target_prob[id 4]"] == pytest.approx(9 / 60)
    assert bool(table[table["loop"] == 1]["kl_to_previous"].isna().all())
    assert result.first_loop_correct("id 4").shape == (3, 2, 1)
    assert result.first_loop_correct(4)[2, 1, 0] == 4 and bool(result.first_loop_correct(4)[1, 1, 0].isnan())
    assert result.first_loop_correct("d")[0, 0, 0] == 1
    flips = result.answer_flips()  # ids go up by six from loop to loop, so the top token, by threes, never changes
    assert len(flips) == 0 and flips.columns[0] == "layer"


def test_top_tokens_are_nested_as_the_axes() -> None:
    assert FLIPS.top_tokens()[1] == [["c"], ["d"], ["g"], ["i"]]
    tops = layered().top_tokens(batch=1)
    assert (len(tops), len(tops[0]), len(tops[0][0]), tops[1][2][0]) == (2, 3, 1, ["c", "d"])


# Its figures.


def cells(figure: Any) -> dict[str, Any]:
    return figure.to_dict()["data"][0]


def test_the_figure_over_positions_has_each_loops_top_tokens() -> None:
    shown = cells(FLIPS.plot())
    assert shown["text"] == [["b", "d", "f", "j"], ["c", "d", "g", "i"], ["b", "d", "h", "j"], ["b", "d", "d", "i"]]
    torch.testing.assert_close(Tensor(shown["z"]), FLIPS.top_probs[:, 0, :, 0], atol=1e-6, rtol=1e-4)
    assert shown["customdata"][2][1][0] == "position 1, reads b<br>after loop 2:"


def test_the_figures_of_a_result_with_layers() -> None:
    result = layered()
    shown = cells(result.plot(batch=1, layer=1))
    torch.testing.assert_close(Tensor(shown["z"]), result.top_probs[:, 1, 1, :, 0])
    assert shown["customdata"][1][0][0] == "position 1, reads i<br>loop 4, leaving core layer 5:"
    figure = result.plot_layers(batch=1)
    torch.testing.assert_close(Tensor(cells(figure)["z"]), result.top_probs[:, :, 1, 0, 0])
    assert cells(figure)["customdata"][0][2][0] == "loop 1, leaving core layer 6:"
    assert figure.to_dict()["layout"]["title"]["text"] == "position 1, reads i"
    assert list(figure.to_dict()["layout"]["xaxis"]["ticktext"]) == ["0", "5", "6"]
    assert list(figure.to_dict()["layout"]["yaxis"]["ticktext"]) == ["1", "4"]


def test_padding_leaves_a_gap_in_the_figure() -> None:
    gap = constructed(
        [[1, -1], [2, -1]], [[0, -1], [0, -1]], [True, False], top_probs=torch.tensor([[[[0.5], [NAN]]]] * 2)
    )
    shown = cells(gap.plot())
    assert [row[1] for row in shown["z"]] == [None, None]
    assert [row[1] for row in shown["text"]] == ["", ""]
    assert gap.answer_flips()["pos"].tolist() == [0]
    assert len(gap.to_dataframe()) == 2


def test_what_a_result_can_not_say() -> None:
    with pytest.raises(InputError, match=r"follows \['d'\], not 'e'.*logit_lens\(..., targets=...\)"):
        FLIPS.rank_trajectory("e")
    with pytest.raises(InputError, match=r"follows \['d', 'id 4'\], not None: pass one of them"):
        layered().rank_trajectory()
    with pytest.raises(InputError, match="reads the state, which has no layers: pass site='resid_post'"):
        FLIPS.plot_layers()
    with pytest.raises(InputError, match="batch 1 is out of range: 1 exist"):
        FLIPS.plot(batch=1)
    with pytest.raises(InputError, match="layer 3 is out of range: 3 exist"):
        layered().plot(layer=3)
    with pytest.raises(InputError, match="position 1 is out of range: 1 exist"):
        layered().plot_layers(position=1)
