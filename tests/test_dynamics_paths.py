"""Path independence: several starts, one end."""

from itertools import combinations
from pathlib import Path
from typing import Any

import helpers
import pytest
import torch

from tl_looped import InputError
from tl_looped.dynamics import PathIndependence, path_independence
from tl_looped.dynamics.paths import noise_around, pairwise_distances


def settling(**changes: Any):
    model = helpers.make(torch.float64, **{**helpers.TINY["llama"], **changes})
    with torch.no_grad():
        model.transformer.injection.weight[:, : model.cfg.d_model] *= 0.05
    return model


def test_distances_by_hand():
    states = torch.randn(3, 4, 5, dtype=torch.float64)
    found = pairwise_distances(states)
    for pair, (a, b) in enumerate(combinations(range(3), 2)):
        for pos in range(4):
            x, y = states[a, pos], states[b, pos]
            expected = float((x - y).norm()) / ((float(x.norm()) + float(y.norm())) / 2)
            assert found[pair, pos].item() == pytest.approx(expected)
    zero = torch.zeros(2, 1, 3)
    assert pairwise_distances(zero).isnan().all()
    opposite = torch.stack((torch.ones(1, 3), -torch.ones(1, 3)))
    assert pairwise_distances(opposite).item() == pytest.approx(2)
    assert pairwise_distances(opposite.bfloat16()).dtype == torch.float32
    with pytest.raises(InputError, match="distances are between two starts, got 1"):
        pairwise_distances(torch.ones(1, 2, 3))


def test_noise_has_its_size():
    state = torch.randn(2, 3, 8, dtype=torch.float64)
    moved = noise_around(state, 0.5, seed=1)
    assert torch.allclose((moved - state).norm(dim=-1), 0.5 * state.norm(dim=-1))
    assert torch.equal(moved, noise_around(state, 0.5, seed=1)) and not torch.equal(moved, noise_around(state, 0.5, 2))
    zero = torch.zeros(2, 8)
    assert torch.allclose(noise_around(zero, 2.0, 0, torch.tensor([1.0, 3.0])).norm(dim=-1), torch.tensor([2.0, 6.0]))
    assert noise_around(state.bfloat16(), 0.5, 1).dtype == torch.bfloat16


def test_noise_refuses():
    with pytest.raises(InputError, match="noise must be a finite number above 0, got 0.0"):
        noise_around(torch.ones(2, 3), 0.0, 0)
    with pytest.raises(InputError, match="relative to a state that is zero would be none: pass size="):
        noise_around(torch.zeros(2, 3), 1.0, 0)
    with pytest.raises(InputError, match="seed must be at least 0, got -1"):
        noise_around(torch.ones(2, 3), 1.0, -1)


@pytest.mark.parametrize("family", ["huginn", "llama", "olmo2"])
def test_drawn_states_against_single_runs(family: str):
    model = helpers.tiny(family)
    tokens = helpers.tokens_for(model, batch=1)
    found = path_independence(model, tokens, 4, seeds=[5, 0, 2])
    runs = [model.run_with_cache(tokens, 4, seed=seed, names_filter="hook_state_post")[1] for seed in (5, 0, 2)]
    for t in range(4):
        states = torch.stack([cache["state_post", t][0] for cache in runs])
        assert torch.allclose(found.distances[t], pairwise_distances(states), atol=1e-5)
    assert found.starts == ("seed 5", "seed 0", "seed 2")
    table = found.to_dataframe().set_index(["loop", "start", "other_start", "pos"])["distance"]
    assert table[2, "seed 5", "seed 2", 3] == pytest.approx(float(found.distances[2, 1, 3]))


@pytest.mark.parametrize("family", helpers.TINY)
def test_noise_against_single_runs(family: str):
    model = helpers.tiny(family)
    tokens = helpers.tokens_for(model, batch=1)
    found = path_independence(model, tokens, 3, noise=0.3, seeds=[7])
    own = model(tokens, 3, stop_at_loop=0)
    starts = [own, noise_around(own, 0.3, 7)]
    ends = [model(tokens, 3, initial_state=start, stop_at_loop=3)[0] for start in starts]
    assert torch.allclose(found.distances[-1], pairwise_distances(torch.stack(ends)), atol=1e-5)
    assert found.starts == ("own", "noise 7") and found.made_by["noise"] == 0.3


def test_given_states_against_single_runs():
    model = helpers.tiny("ouro")
    tokens = helpers.tokens_for(model, batch=1)
    states = [helpers.noise_like(torch.zeros(1, 5, 16), seed) for seed in range(3)]
    found = path_independence(model, tokens, 3, initial_states=[states[0], states[1][0], states[2]])
    ends = [model(tokens, 3, initial_state=state, stop_at_loop=3)[0] for state in states]
    assert torch.allclose(found.distances[-1], pairwise_distances(torch.stack(ends)), atol=1e-5)
    assert found.starts == ("given 0", "given 1", "given 2")


def test_a_zero_state_gets_noise_of_the_size_of_the_first_state():
    model = helpers.make(**{**helpers.TINY["llama"], "state_init": "zeros"})
    tokens = helpers.tokens_for(model, batch=1)
    size = model(tokens, 3, stop_at_loop=1).norm(dim=-1)
    found = path_independence(model, tokens, 3, noise=0.5, seeds=[1])
    start = noise_around(torch.zeros(1, 5, 16), 0.5, 1, size)
    ends = [model(tokens, 3, initial_state=state, stop_at_loop=3)[0] for state in (torch.zeros(1, 5, 16), start)]
    assert torch.allclose(found.distances[-1], pairwise_distances(torch.stack(ends)), atol=1e-5)


def test_a_contraction_meets_and_a_model_without_injection_does_not():
    model = settling()
    tokens = helpers.tokens_for(model, batch=1)
    found = path_independence(model, tokens, 24)
    assert found.share() == 1.0 and bool(found.meets.all()) and found.distances.shape == (24, 6, 5)
    for pos in range(5):
        within = [bool((d <= 1e-2).all()) for d in found.distances[:, :, pos]]
        assert found.loop[pos].item() == next(t for t in range(24) if all(within[t:]))
    free = helpers.make(norm_placement="pre")
    found = path_independence(free, tokens, 24, noise=1.0)
    assert found.share() == 0.0 and found.loop.isnan().all()
    assert path_independence(free, tokens, 24, noise=1.0, tolerance=2.1).loop.eq(0).all()


def test_one_loop_and_one_token_are_enough():
    model = helpers.tiny("llama")
    assert path_independence(model, torch.tensor([3]), 1).distances.shape == (1, 6, 1)


@pytest.mark.parametrize(
    ("family", "options", "message"),
    [
        (
            "ouro",
            {},
            r"so seeds change nothing: it starts from e, what comes out of the embedding. Pass noise=0.5",
        ),
        ("ouro", {"seeds": [1, 2]}, "so seeds change nothing"),
        ("llama", {"seeds": [1]}, r"one start has nothing to meet: pass two or more, got \['seed 1'\]"),
        ("llama", {"seeds": [1, 1]}, r"seeds names one twice: \[1, 1\]"),
        ("llama", {"seeds": [-1, 1]}, "a seed must be at least 0, got -1"),
        ("llama", {"noise": -0.5}, "noise must be a finite number above 0, got -0.5"),
        ("llama", {"tolerance": 0.0}, "tolerance must be a finite number above 0, got 0.0"),
        ("llama", {"initial_state": torch.zeros(1, 5, 16)}, r"pass initial_states=\[...\]"),
        ("llama", {"initial_states": [torch.zeros(5, 16)] * 2, "noise": 1.0}, "leave out seeds and noise"),
        ("llama", {"initial_states": [torch.zeros(5, 16)]}, "one start has nothing to meet"),
        ("llama", {"initial_states": [torch.zeros(5, 8)] * 2}, r"initial_state must be a tensor of shape \(1, 5, 16\)"),
        ("llama", {"stop_at_loop": 1}, "path_independence has no argument 'stop_at_loop'"),
    ],
)
def test_bad_input(family: str, options: dict[str, Any], message: str, as_a_user: None):
    model = helpers.tiny(family)
    with pytest.raises(InputError, match=message):
        path_independence(model, helpers.tokens_for(model, batch=1), 3, **options)


def test_one_prompt_with_finite_states():
    model = helpers.tiny("llama")
    with pytest.raises(InputError, match="this looks at one prompt, got 2"):
        path_independence(model, helpers.tokens_for(model), 3)
    states = [torch.zeros(5, 16), torch.zeros(5, 16)]
    states[1][2] = float("inf")
    with pytest.raises(InputError, match="states are not finite from start 'given 1', position 2 on"):
        path_independence(model, helpers.tokens_for(model, batch=1), 3, initial_states=states)
    states[1][2] = 0

    def spoil(x: torch.Tensor, hook: Any) -> torch.Tensor:
        return torch.where(torch.arange(5)[:, None] == 3, float("nan"), x) if hook.loop == 1 else x

    with (
        model.hooks(fwd_hooks=[("blocks.1.hook_mlp_out", spoil)]),
        pytest.raises(InputError, match="states are not finite from loop 1, start 0, position 3 on"),
    ):
        path_independence(model, helpers.tokens_for(model, batch=1), 3, initial_states=states)
    assert helpers.hook_count(model) == 0


def test_the_figure_and_the_file(tmp_path: Path):
    model = settling(tokenizer=helpers.word_tokenizer())
    found = path_independence(model, "a b c d", 12)
    fig = found.plot()
    curves = {trace.name: trace for trace in fig.data}
    assert set(curves) == {"each other position", "last position", "median over positions"}
    farthest = found.distances.amax(1)
    assert list(curves["last position"].y) == pytest.approx(farthest[:, -1].tolist(), rel=1e-4)
    assert fig.layout.shapes[0].y0 == 0.01 and "meet at 4 of 4 positions" in fig.layout.title.text
    assert found.str_tokens == ("a", "b", "c", "d")
    again = PathIndependence.load(found.save(tmp_path / "paths"))
    assert again.to_dataframe().equals(found.to_dataframe())
    with pytest.raises(InputError, match="the distance between runs has no value above zero"):
        PathIndependence({}, ("a", "b"), ("x",), 0.1, torch.zeros(3, 1, 1)).plot()
