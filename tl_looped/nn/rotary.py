"""Rotary position embedding: both pairings, and Llama 3's frequency scaling."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_looped.engine.config import Llama3Rope, LoopedConfig, RotaryStyle


def inverse_frequencies(cfg: LoopedConfig) -> Float[Tensor, " half"]:
    """Radians per position of each pair: base^(-2i / d_head), with the config's scaling; float32, on the CPU."""
    exponents = torch.arange(0, cfg.d_head, 2, dtype=torch.float32, device="cpu") / cfg.d_head
    frequencies = 1.0 / cfg.rotary_base**exponents
    return frequencies if cfg.rotary_scaling is None else _llama3(frequencies, cfg.rotary_scaling)


def _llama3(frequencies: Float[Tensor, " half"], scaling: Llama3Rope) -> Float[Tensor, " half"]:
    """Long wavelengths are stretched by `factor`, short ones kept, those between interpolated."""
    turns = scaling.original_n_ctx * frequencies / (2 * math.pi)  # full turns within the original context
    span = scaling.high_freq_factor - scaling.low_freq_factor
    keep = ((turns - scaling.low_freq_factor) / span).clamp(0.0, 1.0)
    return frequencies * (keep + (1 - keep) / scaling.factor)


def component_frequencies(cfg: LoopedConfig) -> Float[Tensor, " d_head"]:
    """Radians per position of each component of a head, as `rotate` wants them: the first of a pair turns backward."""
    pairs = inverse_frequencies(cfg)[:, None] * torch.tensor([-1.0, 1.0], device="cpu")
    return pairs.T.flatten() if cfg.rotary_style == "halves" else pairs.flatten()


def rotary_angles(
    frequencies: Float[Tensor, " d_head"], positions: Int[Tensor, "rows pos"]
) -> tuple[Float[Tensor, "rows pos 1 d_head"], Float[Tensor, "rows pos 1 d_head"]]:
    """Cosine and sine for every position and component, broadcast over heads, float32."""
    angles = positions[:, :, None, None] * frequencies
    return angles.cos(), angles.sin()


def rotate(
    x: Float[Tensor, "batch pos heads d_head"],
    cos: Float[Tensor, "rows pos 1 d_head"],
    sin: Float[Tensor, "rows pos 1 d_head"],
    style: RotaryStyle,
) -> Float[Tensor, "batch pos heads d_head"]:
    """Rotate each pair of components by its angle; the pairs lie side by side ("adjacent") or half a head apart.

    (a, b) -> (a cos - b sin, b cos + a sin): every component times cos, plus its partner times a sine that is negative
    for the first of a pair.
    """
    halves = style == "halves"
    partner = x.roll(x.shape[-1] // 2, dims=-1) if halves else x.unflatten(-1, (-1, 2)).flip(-1).flatten(-2)
    return x * cos + partner * sin
