"""Similarity of all layer calls, and whether the layers' fixed points are distinct."""

from pathlib import Path
from typing import Any

import helpers
import pytest
import torch

from tl_looped import InputError
from tl_looped.dynamics import Cycle, Similarity, convergence, cycle, cycle_of, similarity, similarity_of
from tl_looped.dynamics.layers import similarity_matrix

PROMPTS = [[2, 5, 7], [3, 4, 9, 11, 6]]


def plain_similarity(states: torch.Tensor) -> list[list[float]]:
    """[call, token, d_model] by loops over everything."""
    rows = []
    for a in states:
        row = []
        for b in states:
            cosines = [float(x @ y / (x.norm() * y.norm())) for x, y in zip(a, b, strict=True)]
            row.append(sum(cosines) / len(cosines))
        rows.append(row)
    return rows


def test_similarity_against_plain_loops():
    states = torch.randn(5, 3, 7, dtype=torch.float64)
    found = similarity_matrix(states)
    assert torch.allclose(found, torch.tensor(plain_similarity(states), dtype=torch.float64))
    assert torch.allclose(similarity_matrix(states.reshape(5, 3, 1, 7)), found)
    assert similarity_matrix(states.bfloat16()).dtype == torch.float32


def test_similarity_of_known_directions():
    x = torch.tensor([1.0, 0.0])
    y = torch.tensor([0.0, 2.0])
    states = torch.stack((x, 3 * x, -x, y))[:, None]
    expected = [[1.0, 1.0, -1.0, 0.0], [1.0, 1.0, -1.0, 0.0], [-1.0, -1.0, 1.0, 0.0], [0.0, 0.0, 0.0, 1.0]]
    assert torch.allclose(similarity_matrix(states), torch.tensor(expected))


def test_a_zero_state_counts_where_it_is_not_zero():
    states = torch.ones(2, 2, 3)
    states[0, 0] = 0
    states[1, 0] *= -1
    assert torch.allclose(similarity_matrix(states), torch.ones(2, 2))  # the second token alone, in pairs with call 0
    states[0] = 0
    found = similarity_matrix(states)
    assert found[0].isnan().all() and found[:, 0].isnan().all() and not found[1, 1].isnan()


def test_similarity_refuses():
    states = torch.ones(4, 2, 3)
    states[2, 1, 0] = float("inf")
    with pytest.raises(InputError, match="states are not finite from call 2, axis 1 1 on"):
        similarity_matrix(states)
    with pytest.raises(InputError, match=r"states must be floats \[call, ..., d_model\], not empty, got .* \(0, 3\)"):
        similarity_matrix(torch.ones(0, 3))


@pytest.mark.parametrize("family", helpers.TINY)
def test_similarity_of_a_model_is_that_of_its_cache(family: str):
    model = helpers.tiny(family)
    tokens = helpers.tokens_for(model)
    _, cache = model.run_with_cache(tokens, 3)
    found = similarity(model, tokens, 3)
    rows = [cache["resid_post", layer, loop].flatten(0, 1) for loop in range(3) for layer in range(2)]
    assert torch.allclose(found.matrix, torch.tensor(plain_similarity(torch.stack(rows))), atol=1e-5)
    assert (found.loops, found.layers) == ((0, 1, 2), (0, 1))
    some = similarity_of(cache.apply_slice_to_loops([0, 2]))
    assert torch.allclose(some.matrix, found.matrix[[0, 1, 4, 5]][:, [0, 1, 4, 5]]) and some.loops == (0, 2)
    table = found.to_dataframe().set_index(["loop", "layer", "other_loop", "other_layer"])["cosine"]
    assert table[1, 0, 2, 1] == pytest.approx(float(found.matrix[2, 5]))


def test_similarity_of_some_layers_and_of_one_prompt():
    model = helpers.tiny("ouro")
    tokens = helpers.tokens_for(model, batch=1)
    _, cache = model.run_with_cache(
        tokens, 3, names_filter=lambda name: name.startswith("blocks.1") and "resid_post" in name, remove_batch_dim=True
    )
    found = similarity_of(cache)
    assert found.layers == (1,) and found.matrix.shape == (3, 3)
    assert torch.allclose(found.matrix, similarity(model, tokens, 3).matrix[1::2, 1::2], atol=1e-6)


def test_padding_is_left_out_of_similarity():
    model = helpers.make(tokenizer=helpers.word_tokenizer(), **helpers.TINY["llama"])
    both = similarity(model, ["a b c d", "e f"], 3).matrix
    parts = [similarity(model, text, 3).matrix for text in ("a b c d", "e f")]
    assert torch.allclose(both, (4 * parts[0] + 2 * parts[1]) / 6, atol=1e-5)


def test_similarity_of_a_model_refuses():
    model = helpers.tiny("huginn")
    tokens = helpers.tokens_for(model)
    with pytest.raises(InputError, match="this compares loops, and the run has 1: pass n_loops of at least 2"):
        similarity(model, tokens, 1)
    with pytest.raises(InputError, match="leave out start_at_loop and stop_at_loop"):
        similarity(model, model.prepare(tokens, 3, stop_at_loop=2))
    _, cache = model.run_with_cache(tokens, 3, pos_slice=-1)
    with pytest.raises(InputError, match=r"positions of a run of \(2, 5\): cache all positions"):
        similarity_of(cache)
    _, cache = model.run_with_cache(tokens, 3, names_filter="hook_embed")
    with pytest.raises(InputError, match="'resid_post' is not cached at any loop"):
        similarity_of(cache)
    _, cache = model.run_with_cache(tokens, 3)
    cache["resid_post", 1, 2][0, 3, 0] = float("nan")
    with pytest.raises(InputError, match="not finite from loop 2, layer 1, prompt 0, position 3 on"):
        similarity_of(cache.apply_slice_to_loops([0, 2]))


def test_the_similarity_figure():
    found = similarity(helpers.tiny("huginn"), helpers.tokens_for(helpers.tiny("huginn")), 3)
    fig = found.plot()
    assert torch.allclose(torch.tensor(fig.data[0].z), found.matrix, atol=1e-4)
    assert fig.data[0].customdata[2][5] == "loop 1, layer 0 and loop 2, layer 1"
    assert sorted(shape.x0 for shape in fig.layout.shapes if shape.x0 == shape.x1) == [1.5, 3.5]
    assert list(fig.layout.xaxis.ticktext) == ["0", "1", "2"]
    with pytest.raises(InputError, match="the similarities have no finite value"):
        Similarity({}, (0,), (0,), torch.full((1, 1), float("nan"))).plot()


# Fixed points.


def test_distinct_and_degenerate_points():
    x, y, z = torch.eye(3, dtype=torch.float64)
    points = torch.stack((torch.stack((x, x, x)), torch.stack((2 * x, x + 0.001 * y, x + y)), torch.stack((x, x, -z))))
    found = cycle_of(points)
    assert found.smallest.tolist() == pytest.approx([1.0, 1 / (1 + 1e-6) ** 0.5, 0.0])
    assert found.layer.tolist()[1:] == [1, 2]
    assert found.degenerate.tolist() == [1.0, 1.0, 0.0] and found.verdict() == "mixed"
    assert cycle_of(points[:, :2]).verdict() == "degenerate"
    assert cycle_of(points[:, 2:]).verdict() == "distinct"
    assert cycle_of(points[:, :2], threshold=0.9999999).verdict() == "mixed"


def test_smallest_cosine_against_plain_loops():
    points = torch.randn(4, 5, 3, dtype=torch.float64)
    found = cycle_of(points, axes=("token",))
    for i in range(5):
        cosines = [float(points[0, i] @ p / (points[0, i].norm() * p.norm())) for p in points[1:, i]]
        assert found.smallest[i].item() == pytest.approx(min(cosines))
        assert found.layer[i].item() == 1 + cosines.index(min(cosines))
    assert found.to_dataframe()["token"].tolist() == list(range(5))


def test_without_fixed_points_there_is_no_verdict():
    points = torch.randn(3, 4, 5)
    converged = torch.ones(3, 4)
    converged[2, 1], converged[0, 3] = 0.0, float("nan")
    found = cycle_of(points, converged)
    assert found.smallest.isnan().tolist() == [False, True, False, True] == found.degenerate.isnan().tolist()
    assert found.layer[1] == found.layer[3] == -1
    assert found.to_dataframe()["verdict"][1] == "no fixed points"
    none = cycle_of(points, torch.zeros(3, 4))
    assert none.verdict() == "no fixed points"
    with pytest.raises(InputError, match="no token has fixed points in all layers"):
        none.plot()


@pytest.mark.parametrize(
    ("points", "options", "message"),
    [
        (torch.ones(1, 4, 3), {}, r"at least two layers, got \(1, 4, 3\)"),
        (torch.ones(3), {}, r"at least two layers, got \(3,\)"),
        (torch.full((2, 4, 3), float("nan")), {}, "not finite from layer 0, axis 1 0 on"),
        (torch.ones(2, 4, 3), {"threshold": 1.0}, "threshold must be a number above -1 and below 1, got 1.0"),
        (
            torch.ones(2, 4, 3),
            {"converged": torch.ones(4)},
            r"converged must have .* got \(2, 4\) and \(4,\)",
        ),
    ],
)
def test_a_cycle_of_points_refuses(points: torch.Tensor, options: dict[str, Any], message: str, as_a_user: None):
    with pytest.raises(InputError, match=message):
        cycle_of(points, **options)


def settling(**changes: Any):
    model = helpers.make(torch.float64, **{**helpers.TINY["llama"], "n_core": 3, **changes})
    with torch.no_grad():
        model.transformer.injection.weight[:, : model.cfg.d_model] *= 0.05
    return model


def test_the_cycle_of_a_model_that_settles():
    model = settling()
    found = cycle(model, PROMPTS, 24, progress=False)
    assert not found.smallest.isnan().any()
    column = 0
    for prompt in PROMPTS:
        _, cache = model.run_with_cache(torch.tensor([prompt]), 24, loops=[-1])
        for pos in range(len(prompt)):
            ends = [cache["resid_post", layer, -1][0, pos] for layer in range(3)]
            cosines = [float(ends[0] @ end / (ends[0].norm() * end.norm())) for end in ends[1:]]
            assert found.smallest[column].item() == pytest.approx(min(cosines), abs=1e-10)
            column += 1
    assert found.places["prompt"].tolist() == [0] * 3 + [1] * 5
    assert found.made_by["n_loops"] == 24 and found.made_by["threshold"] == 0.99
    assert cycle(model, PROMPTS, 24, threshold=-0.999, progress=False).verdict() == "degenerate"


def test_layers_that_do_nothing_have_one_fixed_point():
    model = settling()
    with torch.no_grad():
        for block in list(model.transformer.blocks)[1:]:
            block.attn.o.weight.zero_()
            block.mlp.down.weight.zero_()
    found = cycle(model, PROMPTS, 24, progress=False)
    assert found.verdict() == "degenerate" and torch.allclose(found.smallest, torch.ones(8, dtype=torch.float64))


def test_no_cycle_where_a_layer_does_not_converge():
    model = helpers.make(norm_placement="pre")
    judged = convergence(model, PROMPTS, 8, tolerance=1e-6, progress=False)
    found = cycle(model, PROMPTS, 8, tolerance=1e-6, progress=False)
    assert judged.share() == 0 and found.smallest.isnan().all() and found.verdict() == "no fixed points"


def test_a_cycle_needs_layers(as_a_user: None):
    with pytest.raises(InputError, match="this model has one core layer"):
        cycle(helpers.make(n_core=1), PROMPTS)


def test_a_cycle_from_a_given_state_in_batches():
    model = settling()
    state = torch.randn(5, 16, dtype=torch.float64)
    found = cycle(model, PROMPTS, 24, initial_state=state, batch_size=1, progress=False)
    assert torch.allclose(found.smallest, cycle(model, PROMPTS, 24, progress=False).smallest)  # one fixed point each
    few = cycle(model, PROMPTS, 2, tolerance=10.0, hold=1.0, initial_state=state, progress=False)
    _, cache = model.run_with_cache([PROMPTS[1]], 2, initial_state=state, loops=[-1])
    ends = torch.stack([cache["resid_post", layer, -1][0] for layer in range(3)])
    assert torch.allclose(few.smallest[3:], cycle_of(ends).smallest)


def test_the_cycle_is_kept_and_drawn(tmp_path: Path):
    found = cycle(settling(), PROMPTS, 24, seed=4, progress=False)
    assert found.made_by["initial_state"] == "seed 4"
    assert Cycle.load(found.save(tmp_path / "cycle")).to_dataframe().equals(found.to_dataframe())
    fig = found.plot()
    assert list(fig.data[0].x) == pytest.approx(found.smallest.tolist(), rel=1e-4)
    assert fig.layout.shapes[0].x0 == 0.99
    one = cycle_of(torch.ones(2, 3, 4), torch.tensor([[1.0, 1.0, 0.0], [1.0, 1.0, 1.0]])).plot()
    assert "1 of 3 tokens have no fixed points" in one.layout.xaxis.title.text
