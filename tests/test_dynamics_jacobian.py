"""The spectrum of a loop's Jacobian, against dense matrices and against the rate at which states converge."""

import math
from pathlib import Path
from typing import Any

import helpers
import numpy as np
import pytest
import torch
from torch import Tensor

from tl_looped import InputError, LoopedModel
from tl_looped.dynamics import JacobianSpectrum, convergence, jacobian, jacobian_spectrum


def settling(state: float = 0.2) -> LoopedModel:
    model = helpers.make(torch.float64, **helpers.TINY["llama"])
    with torch.no_grad():
        model.transformer.injection.weight[:, : model.cfg.d_model] *= state
    return model


def dense(model: LoopedModel, tokens: Tensor, state: Tensor, loop: int) -> np.ndarray:
    """The whole Jacobian, [pos * d_model, pos * d_model], column by column of autograd."""
    run = model.batch(tokens)
    frame = model.frame(run)
    with torch.no_grad():
        e = model.transformer.read(run.tokens, frame)

    def one_loop(flat: Tensor) -> Tensor:
        return model.transformer.loop(flat.reshape(state.shape), e, frame, loop).flatten()

    found: Any = torch.autograd.functional.jacobian(one_loop, state.flatten())
    return found.numpy()


def by_size(values: np.ndarray) -> np.ndarray:
    return values[np.lexsort((-values.imag, -np.abs(values)))]


@pytest.mark.parametrize("family", helpers.TINY)
def test_leading_eigenvalues_of_the_dense_matrix(family: str):
    model = helpers.tiny(family, torch.float64)
    tokens = helpers.tokens_for(model, batch=1, pos=3)
    found = jacobian_spectrum(model, tokens, 3, loop=1, k=4)
    matrix = dense(model, tokens, model(tokens, 3, stop_at_loop=1).detach(), 1)
    expected = np.abs(by_size(np.linalg.eigvals(matrix)))
    assert found.eigenvalues.abs().numpy() == pytest.approx(expected[:4], rel=1e-6)
    assert found.radius == pytest.approx(expected[0], rel=1e-6)
    assert found.rate == pytest.approx(math.log(expected[0]), rel=1e-6)
    assert found.size == 48 and found.position is None
    assert found.residual.max() < 1e-7


@pytest.mark.parametrize("position", [0, 1, -1])
def test_one_positions_block(position: int):
    model = helpers.tiny("huginn", torch.float64)
    tokens = helpers.tokens_for(model, batch=1, pos=3)
    state = helpers.noise_like(torch.zeros(1, 3, 16, dtype=torch.float64))
    found = jacobian_spectrum(model, tokens, 3, state=state, position=position, k=3)
    place = position % 3
    block = dense(model, tokens, state, 2)[16 * place : 16 * place + 16, 16 * place : 16 * place + 16]
    expected = by_size(np.linalg.eigvals(block))[:3]
    assert found.eigenvalues.abs().numpy() == pytest.approx(np.abs(expected), rel=1e-6)
    assert found.size == 16 and found.position == place


def test_positions_together_have_the_eigenvalues_of_their_blocks():
    model = settling()
    tokens = helpers.tokens_for(model, batch=1, pos=3)
    whole = jacobian_spectrum(model, tokens, 8, k=1).radius
    blocks = [jacobian_spectrum(model, tokens, 8, position=pos, k=1).radius for pos in range(3)]
    assert whole == pytest.approx(max(blocks), rel=1e-6)


def test_the_radius_is_the_rate_of_convergence():
    model = settling()
    tokens = helpers.tokens_for(model, batch=1, pos=3)
    measured = convergence(model, tokens, 64, tolerance=1e-6, progress=False)
    assert measured.share() == 1.0
    radii = [jacobian_spectrum(model, tokens, 64, position=pos, k=2).radius for pos in range(3)]
    for pos in range(3):
        slowest = math.log(max(radii[: pos + 1]))  # what an earlier position does reaches this one
        assert measured.rate[:, pos].tolist() == pytest.approx([slowest] * 2, rel=0.02)
    found = jacobian_spectrum(model, tokens, 64)
    assert found.state_step < 1e-12 and found.rate == pytest.approx(math.log(max(radii)), rel=1e-6)


def test_a_loop_that_is_linear():
    """Layers that add nothing, and an injection of a known matrix: the Jacobian is that matrix at every position."""
    model = helpers.make(torch.float64, **helpers.TINY["llama"])
    angle = 0.7
    turn = [[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]]
    matrix = torch.block_diag(0.9 * torch.tensor(turn), torch.diag(torch.linspace(0.5, 0.1, 14))).double()
    with torch.no_grad():
        model.transformer.injection.weight[:, :16] = matrix
        for block in model.transformer.blocks:
            block.attn.o.weight.zero_()
            block.mlp.down.weight.zero_()
    found = jacobian_spectrum(model, torch.tensor([[1, 2]]), 4, position=1, k=3)
    assert found.eigenvalues.abs().tolist() == pytest.approx([0.9, 0.9, 0.5], rel=1e-6)
    assert found.to_dataframe()["angle"].tolist() == pytest.approx([angle, -angle, 0.0], abs=1e-6)


def test_a_given_state_a_seed_and_a_hook():
    model = helpers.tiny("huginn", torch.float64)
    tokens = helpers.tokens_for(model, batch=1, pos=3)
    state = model(tokens, 4, stop_at_loop=2, seed=3).detach()
    one = jacobian_spectrum(model, tokens, 4, state=state[0], k=2)
    two = jacobian_spectrum(model, tokens, 4, loop=2, seed=3, k=2)
    assert torch.allclose(one.eigenvalues.abs(), two.eigenvalues.abs()) and two.made_by["loop"] == 2
    assert one.state_step == pytest.approx(two.state_step)
    with model.hooks(fwd_hooks=[("loop.2.hook_state_post", lambda x, hook: 3 * x)]):
        three = jacobian_spectrum(model, tokens, 4, loop=2, seed=3, k=2)
    assert three.radius == pytest.approx(3 * two.radius)
    with (
        model.hooks(fwd_hooks=[("loop.3.hook_state_post", lambda x, hook: 3 * x)]),
        pytest.raises(InputError, match="a hook is on 'loop.3.hook_state_post', which this run does not reach"),
    ):
        jacobian_spectrum(model, tokens, 4, loop=2)


def test_repeats_and_works_whatever_the_gradient_mode():
    model = settling()
    tokens = helpers.tokens_for(model, batch=1, pos=2)
    one = jacobian_spectrum(model, tokens, 4)
    with torch.no_grad():
        assert torch.equal(one.real, jacobian_spectrum(model, tokens, 4).real)
    with torch.inference_mode():
        state = model(tokens, 4, stop_at_loop=3)
        assert torch.allclose(one.real, jacobian_spectrum(model, tokens, 4, state=state).real)
    assert all(weight.grad is None for weight in model.parameters())


@pytest.mark.parametrize("factor", [0.1, 1.0, 10.0])
def test_the_residual_is_relative_to_the_eigenvalue(factor: float, monkeypatch: pytest.MonkeyPatch):
    """Of a value and a vector that are no eigenpair, by hand."""
    model = settling()
    tokens = helpers.tokens_for(model, batch=1, pos=2)
    vector = np.random.default_rng(0).standard_normal(32) + 1j
    value = factor * (0.3 + 0.4j)
    monkeypatch.setattr(jacobian, "_arnoldi", lambda *_: (np.array([value]), vector[:, None]))
    found = jacobian_spectrum(model, tokens, 3, k=1)
    matrix = dense(model, tokens, model(tokens, 3, stop_at_loop=2).detach(), 2)
    missed = np.linalg.norm(matrix.T @ vector - value * vector)
    assert found.residual.item() == pytest.approx(missed / (0.5 * factor * np.linalg.norm(vector)), rel=1e-9)


def test_float32_is_good_to_its_rounding():
    model = helpers.tiny("llama")
    tokens = helpers.tokens_for(model, batch=1, pos=2)
    found = jacobian_spectrum(model, tokens, 3, position=1, k=2)
    exact = jacobian_spectrum(helpers.tiny("llama", torch.float64), tokens, 3, position=1, k=2)
    assert found.radius == pytest.approx(exact.radius, rel=1e-3)
    assert 0 < found.residual.max() < 1e-3


def test_a_loop_that_forgets_its_state():
    model = settling(state=0.0)
    with pytest.raises(InputError, match="the Jacobian may be zero at this state"):
        jacobian_spectrum(model, torch.tensor([[1, 2]]), 4)


def test_no_convergence_says_what_to_change():
    model = helpers.tiny("ouro", torch.float64)
    with pytest.raises(InputError, match=r"ARPACK found \d+ of k=20 eigenvalues in max_iterations=1: raise max_iter"):
        jacobian_spectrum(model, helpers.tokens_for(model, batch=1), 3, k=20, max_iterations=1, tolerance=1e-14)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"k": 47}, "the Jacobian has 48 rows, so k must be at most 46, got 47"),
        ({"k": 15, "position": 0}, "has 16 rows, so k must be at most 14"),
        ({"k": 0}, "k must be at least 1, got 0"),
        ({"loop": 3}, "loop 3 is out of range: 3 exist"),
        ({"position": 3}, "position 3 is out of range: 3 exist"),
        ({"tolerance": 2.0}, "tolerance must be a number above 0 and below 1, got 2.0"),
        ({"max_iterations": 0}, "max_iterations must be at least 1"),
        (
            {"start_at_loop": 1, "initial_state": torch.zeros(1, 3, 16)},
            "jacobian_spectrum has no argument 'start_at_loop'",
        ),
        ({"state": torch.zeros(1, 3, 16), "initial_state": torch.zeros(1, 3, 16)}, "state is given, so leave out"),
        ({"state": torch.zeros(2, 16)}, r"must be a tensor of shape \(1, 3, 16\)"),
        ({"state": torch.full((3, 16), math.nan)}, "not finite, from 'loop.2.hook_state_pre' .* on"),
    ],
)
def test_bad_input(options: dict[str, Any], message: str, as_a_user: None):
    model = helpers.tiny("llama")
    with pytest.raises(InputError, match=message):
        jacobian_spectrum(model, helpers.tokens_for(model, batch=1, pos=3), 3, **options)


def test_models_and_prompts_that_are_refused():
    with pytest.raises(InputError, match="the model is torch.bfloat16: load it in float32, or better float64"):
        jacobian_spectrum(helpers.make(torch.bfloat16), torch.tensor([[1, 2]]))
    with pytest.raises(InputError, match="this looks at one prompt, got 2"):
        jacobian_spectrum(helpers.tiny("llama"), helpers.tokens_for(helpers.tiny("llama")))


def test_the_figure_and_the_file(tmp_path: Path):
    model = settling()
    found = jacobian_spectrum(model, helpers.tokens_for(model, batch=1, pos=2), 8)
    fig = found.plot()
    assert list(fig.data[1].x) == pytest.approx(found.real.tolist(), rel=1e-4)
    assert list(fig.data[1].customdata) == pytest.approx(found.eigenvalues.abs().tolist(), rel=1e-4)
    assert f"radius {found.radius:.4g}" in fig.layout.title.text
    again = JacobianSpectrum.load(found.save(tmp_path / "spectrum"))
    assert again.to_dataframe().equals(found.to_dataframe()) and again.radius == found.radius
