"""Lyapunov exponents against closed forms and against the dense product of Jacobians."""

import math
from pathlib import Path
from typing import Any

import helpers
import pytest
import torch
from test_dynamics_jacobian import dense, settling
from torch import Tensor

from tl_looped import InputError, LoopedModel
from tl_looped.dynamics import LyapunovExponents, jacobian_spectrum, lyapunov_exponents

PROMPT = torch.tensor([[2, 5, 7]])


def still() -> LoopedModel:
    """A model whose loop changes nothing, for hooks to be the map."""
    model = helpers.make(torch.float64, n_core=1, norm_placement="pre")
    with torch.no_grad():
        for block in model.transformer.blocks:
            block.attn.o.weight.zero_()
            block.mlp.down.weight.zero_()
    return model


def test_a_linear_map_has_the_logs_of_its_eigenvalues():
    """Not normal, so single products grow otherwise; every position has them once."""
    generator = torch.Generator().manual_seed(0)
    basis = torch.randn(16, 16, generator=generator, dtype=torch.float64)
    values = torch.linspace(0.3, 1.02, 16, dtype=torch.float64)
    matrix, model = basis @ values.diag() @ basis.inverse(), still()
    with model.hooks(fwd_hooks=[("hook_state_pre", lambda x, hook: x @ matrix.T)]):
        found = lyapunov_exponents(model, PROMPT[:, :1], 256, k=3)
    assert found.exponents.numpy() == pytest.approx(values.flip(0)[:3].log().numpy(), abs=0.01)
    assert found.growth.shape == (128, 3) and found.first_loop == 64


def test_the_logistic_map_doubles_differences():
    """x → 4x (1 − x) has the exponent log 2, in every coordinate by itself."""
    model = still()
    state = torch.rand(1, 3, 16, generator=torch.Generator().manual_seed(1), dtype=torch.float64) * 0.8 + 0.1
    with model.hooks(fwd_hooks=[("hook_state_pre", lambda x, hook: 4 * x * (1 - x))]):
        found = lyapunov_exponents(model, PROMPT, 400, k=4, initial_state=state)
    assert found.exponents.numpy() == pytest.approx([math.log(2)] * 4, abs=0.15)
    assert (found.exponents > 3 * found.error).all()


@pytest.mark.parametrize("family", ["llama", "ouro"])
def test_against_the_product_of_dense_jacobians(family: str):
    """The same loops, the same first directions: one factorisation of a dense matrix a loop."""
    model, n_loops, k = helpers.tiny(family, torch.float64), 16, 3
    found = lyapunov_exponents(model, PROMPT, n_loops, k=k)
    generator = torch.Generator().manual_seed(0)
    directions = torch.linalg.qr(torch.randn(48, k, generator=generator, dtype=torch.float64))[0]
    logs: list[Tensor] = []
    for t in range(n_loops - 1, 3, -1):
        state = model(PROMPT, n_loops, stop_at_loop=t).detach()
        jacobian = torch.from_numpy(dense(model, PROMPT, state, t))
        directions, sizes = torch.linalg.qr(jacobian.T @ directions)
        logs.append(sizes.diagonal().abs().log())
    expected = torch.stack(logs[::-1])[:8]
    torch.testing.assert_close(found.growth, expected, atol=1e-8, rtol=1e-6)
    torch.testing.assert_close(found.exponents, expected.mean(0), atol=1e-8, rtol=1e-6)


def test_at_a_fixed_point_it_is_the_log_of_the_spectral_radius(tmp_path: Path):
    model = settling()
    found, spectrum = lyapunov_exponents(model, PROMPT, 256, k=2), jacobian_spectrum(model, PROMPT, 256, k=2)
    assert float(found.exponents[0]) == pytest.approx(spectrum.rate, abs=0.02)
    again = LyapunovExponents.load(found.save(tmp_path / "kept"))
    assert again.to_dataframe().equals(found.to_dataframe())
    assert list(found.plot().data[0].y) == pytest.approx(found.exponents.tolist(), rel=1e-4)


@pytest.mark.parametrize(
    ("dtype", "options", "message"),
    [
        (torch.float64, {"k": 49}, "the state has 48 numbers, so k must be at most 48, got 49"),
        (torch.float64, {"n_loops": 8}, "n_loops must be at least 16, got 8"),
        (torch.float64, {"prompts": [[1, 2], [3, 4]]}, "this looks at one prompt, got 2"),
        (torch.bfloat16, {}, "the model is torch.bfloat16: load it in float32, or better float64, for its Jacobians"),
    ],
)
def test_bad_input(dtype: torch.dtype, options: dict[str, Any], message: str):
    model = helpers.tiny("ouro", dtype)
    with pytest.raises(InputError, match=message):
        lyapunov_exponents(model, **{"prompts": PROMPT, "n_loops": 16, **options})
