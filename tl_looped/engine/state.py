"""The state that enters the first loop."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_looped.engine.config import LoopedConfig

_BLOCK = 16  # torch fills normal samples in blocks of 16, so whole blocks keep a longer draw's beginning equal


def draw_noise(cfg: LoopedConfig, n_positions: int, seed: int | None) -> Float[Tensor, "pos d_model"]:
    """The random initial state for positions 0, 1, ..., float32 on the CPU, so equal on every device.

    A longer draw from the same seed begins with the shorter one. `seed` None takes torch's global generator.
    """
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    rows = -(-n_positions // _BLOCK) * _BLOCK
    if cfg.state_init == "truncated_normal":
        noise = _truncated_normal(rows, cfg.d_model, generator)
    else:
        noise = torch.randn(rows, cfg.d_model, generator=generator)
    return noise[:n_positions] * cfg.state_init_std * cfg.state_init_scale


def _truncated_normal(rows: int, size: int, generator: torch.Generator | None) -> Float[Tensor, "rows size"]:
    """Standard normal numbers within ±3, by inverting their distribution.

    (`torch.nn.init.trunc_normal_` draws again what falls outside, so there a longer draw changes its beginning.)
    """
    uniform = torch.rand(rows, size, generator=generator, dtype=torch.float64)
    quantile = (2 * uniform - 1) * math.erf(3 / math.sqrt(2))
    return (math.sqrt(2) * torch.erfinv(quantile)).clamp(-3, 3).float()


def random_state(
    cfg: LoopedConfig, positions: Int[Tensor, "batch pos"], seed: int | None, dtype: torch.dtype
) -> Float[Tensor, "batch pos d_model"]:
    """One draw for each position, the same in every row: a prompt's state does not depend on its batch or padding."""
    noise = draw_noise(cfg, int(positions.max()) + 1, seed)
    return noise.to(device=positions.device, dtype=dtype)[positions]


def own_state(
    cfg: LoopedConfig, positions: Int[Tensor, "batch pos"], seed: int | None, dtype: torch.dtype
) -> Float[Tensor, "batch pos d_model"] | None:
    """The state that a run starts from when none is given: drawn, or zero; None for the prelude's output."""
    if cfg.draws_state:
        return random_state(cfg, positions, seed, dtype)
    if cfg.starts_from_prelude:
        return None
    return torch.zeros(*positions.shape, cfg.d_model, dtype=dtype, device=positions.device)
