"""Principal components of latent states."""

from pathlib import Path
from typing import Any

import helpers
import pytest
import torch

from tl_looped import InputError
from tl_looped.dynamics import Trajectory, trajectory
from tl_looped.dynamics.components import pca


def test_a_line_has_one_component():
    direction = torch.tensor([3.0, -4.0, 0.0]) / 5
    states = torch.tensor([1.0, 2.0, 3.0]) + torch.arange(6.0)[:, None] * direction
    found = pca(states)
    assert found.explained.tolist() == pytest.approx([1.0, 0.0], abs=1e-6)
    assert torch.allclose(found.directions[0], -direction, atol=1e-6)  # its largest entry is made positive
    assert found.scores[:, 0].tolist() == pytest.approx([2.5, 1.5, 0.5, -0.5, -1.5, -2.5], abs=1e-5)
    assert torch.allclose(found.mean, states.mean(0))


def test_against_the_covariance_matrix():
    states = torch.randn(40, 5, dtype=torch.float64) * torch.tensor([4.0, 3.0, 2.0, 1.0, 0.5]) + 7
    found = pca(states, 3)
    centred = states - states.mean(0)
    values, vectors = torch.linalg.eigh(centred.T @ centred)
    assert torch.allclose(found.explained, values.flip(0)[:3] / values.sum())
    for i in range(3):
        vector = vectors[:, -1 - i]
        vector = vector * vector[vector.abs().argmax()].sign()
        assert torch.allclose(found.directions[i], vector)
        assert torch.allclose(found.scores[:, i], centred @ vector)
    assert all(direction[direction.abs().argmax()] > 0 for direction in found.directions)


def test_all_leading_axes_are_samples():
    states = torch.randn(4, 3, 2, 6)
    found, flat = pca(states), pca(states.reshape(-1, 6))
    assert found.scores.shape == (4, 3, 2, 2) and torch.equal(found.scores.reshape(-1, 2), flat.scores)
    assert torch.equal(found.directions, flat.directions)
    again = pca(states)
    assert torch.equal(found.scores, again.scores)  # exact: nothing is drawn
    assert pca(states.bfloat16()).scores.dtype == torch.float32


def test_states_that_are_all_the_same_have_no_variance():
    found = pca(torch.ones(5, 4))
    assert found.explained.isnan().all() and not found.scores.any()


@pytest.mark.parametrize(
    ("states", "n", "message"),
    [
        (torch.ones(4), 1, r"states must be floats \[..., d_model\], not empty, got .* \(4,\)"),
        (torch.ones(3, 4), 3, "3 states of 4 numbers have at most 2 principal components, got n_components=3"),
        (torch.ones(1, 4), 1, "1 states of 4 numbers have at most 0"),
        (torch.tensor([[1.0], [float("inf")]]), 1, "not finite from axis 0 1 on"),
        (torch.ones(3, 4), 0, "n_components must be at least 1, got 0"),
    ],
)
def test_pca_refuses(states: torch.Tensor, n: int, message: str):
    with pytest.raises(InputError, match=message):
        pca(states, n)


@pytest.mark.parametrize("family", helpers.TINY)
def test_a_models_trajectory_is_the_pca_of_its_cache(family: str):
    model = helpers.tiny(family)
    tokens = helpers.tokens_for(model, batch=1)
    found = trajectory(model, tokens, 4, position=[1, -1], n_components=3)
    _, cache = model.run_with_cache(tokens, 4)
    states = cache.stack("resid_post")[:, :, 0][:, :, [1, 4]]
    expected = pca(states, 3)
    assert torch.allclose(found.scores, expected.scores, atol=1e-5) and found.scores.shape == (4, 2, 2, 3)
    assert torch.allclose((states - found.mean) @ found.directions.T, found.scores, atol=1e-4)
    assert found.positions == (1, 4) and found.str_tokens == (str(int(tokens[0, 1])), str(int(tokens[0, 4])))
    row = found.to_dataframe().set_index(["loop", "layer", "pos"]).loc[(2, 1, 4)]
    assert row["pc3"] == pytest.approx(float(found.scores[2, 1, 1, 2])) and row["token"] == found.str_tokens[1]
    last = trajectory(model, tokens, n_loops=4)
    assert torch.allclose(last.scores, pca(states[:, :, 1:]).scores, atol=1e-5)


def test_text_and_options_reach_the_run():
    model = helpers.make(tokenizer=helpers.word_tokenizer(), **helpers.TINY["huginn"])
    found = trajectory(model, "a b c", seed=3)
    assert found.str_tokens == ("c",) and found.made_by["initial_state"] == "seed 3"
    assert found.scores.shape == (2, 2, 1, 2)
    assert not torch.allclose(found.scores, trajectory(model, "a b c", seed=4).scores)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n_loops": 1}, "this compares loops, and the run has 1"),
        ({"position": 7}, "position 7 is out of range: 5 exist"),
        ({"position": 1.0}, "position must be an integer, got 1.0"),
        ({"position": []}, "position must name one position or several different ones"),
        ({"position": [4, -1]}, "position must name one position or several different ones"),
        ({"n_components": 9}, "these states have at most 3 principal components, got n_components=9"),
    ],
)
def test_a_trajectory_refuses(options: dict[str, Any], message: str, as_a_user: None):
    model = helpers.tiny("llama")
    with pytest.raises(InputError, match=message):
        trajectory(model, helpers.tokens_for(model, batch=1), **options)


def test_a_trajectory_is_of_one_prompt_with_finite_states():
    model = helpers.tiny("llama")
    with pytest.raises(InputError, match="this looks at one prompt, got 2: call it for each"):
        trajectory(model, helpers.tokens_for(model))
    with pytest.raises(InputError, match="the prompt has padding"):
        trajectory(model, torch.tensor([[1, 2, 3]]), attention_mask=torch.tensor([[0, 1, 1]]))

    def spoil(x: torch.Tensor, hook: Any) -> torch.Tensor:
        return x * float("nan")

    with (
        model.hooks(fwd_hooks=[("blocks.1.loop.1.hook_mlp_out", spoil)]),
        pytest.raises(InputError, match="not finite from loop 1, layer 1, position 4 on"),
    ):
        trajectory(model, helpers.tokens_for(model, batch=1))


def test_the_figure_draws_loops_and_the_last_cycle():
    model = helpers.tiny("olmo2")
    found = trajectory(model, helpers.tokens_for(model, batch=1), 5, position=[0, 1, 2, 3])
    fig = found.plot()
    by_panel = [trace for trace in fig.data if trace.xaxis == "x2"]
    cycle, *loops, first = by_panel
    assert cycle.name == "last loop's cycle (numbers: layers)" and list(cycle.text) == ["0", "1", ""]
    closed = found.scores[-1, [0, 1, 0], 1, 0]
    assert list(cycle.x) == pytest.approx(closed.tolist(), rel=1e-4)
    assert len(loops) == 5 and first.name == "first loop"
    assert list(loops[2].customdata) == ["loop 1, layer 1", "loop 2, layer 0", "loop 2, layer 1"]
    assert list(loops[2].y) == pytest.approx(found.scores[:, :, 1, 1].flatten()[3:6].tolist(), rel=1e-4)
    assert len({trace.line.color for trace in loops}) == 5
    assert fig.layout.xaxis4.title.text.startswith("component 1 (")
    with pytest.raises(InputError, match="with one component can't be drawn: pass n_components=2"):
        trajectory(model, helpers.tokens_for(model, batch=1), n_components=1).plot()


def test_kept_in_a_file(tmp_path: Path):
    model = helpers.tiny("olmo2")
    found = trajectory(model, helpers.tokens_for(model, batch=1))
    again = Trajectory.load(found.save(tmp_path / "trajectory"))
    assert again.to_dataframe().equals(found.to_dataframe()) and again.positions == (4,)
