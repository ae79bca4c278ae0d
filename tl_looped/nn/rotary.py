"""Rotary position embedding: both pairings, both directions, and scalings of the frequencies."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_looped.engine.config import LoopedConfig
from tl_looped.engine.network import Angles
from tl_looped.engine.parts import LinearRope, Llama3Rope, Rotary, RotaryStyle


def inverse_frequencies(rotary: Rotary, d_head: int) -> Float[Tensor, " half"]:
    """Radians per position of each pair: base^(-2i / size), scaled; float32, on the CPU."""
    size = rotary.size or d_head
    exponents = torch.arange(0, size, 2, dtype=torch.float32, device="cpu") / size
    frequencies = 1.0 / rotary.base**exponents
    if isinstance(rotary.scaling, Llama3Rope):
        return _llama3(frequencies, rotary.scaling)
    return frequencies / rotary.scaling.factor if isinstance(rotary.scaling, LinearRope) else frequencies


def _llama3(frequencies: Float[Tensor, " half"], scaling: Llama3Rope) -> Float[Tensor, " half"]:
    """Long wavelengths are stretched by `factor`, short ones kept, those between interpolated."""
    turns = scaling.original_n_ctx * frequencies / (2 * math.pi)  # full turns within the original context
    span = scaling.high_freq_factor - scaling.low_freq_factor
    keep = ((turns - scaling.low_freq_factor) / span).clamp(0.0, 1.0)
    return frequencies * (keep + (1 - keep) / scaling.factor)


def component_frequencies(rotary: Rotary, d_head: int) -> Float[Tensor, " size"]:
    """Radians per position of each component, as `rotate` wants them: the first of a pair turns backward."""
    signs = torch.tensor([1.0, -1.0] if rotary.reversed else [-1.0, 1.0], device="cpu")
    pairs = inverse_frequencies(rotary, d_head)[:, None] * signs
    return pairs.T.flatten() if rotary.style == "halves" else pairs.flatten()


def rotary_angles(
    frequencies: Float[Tensor, " size"],
    positions: Int[Tensor, "rows pos"],
    dtype: torch.dtype,
    rounded_to: torch.dtype = torch.float32,
) -> Angles:
    """Cosine and sine for every position and component, broadcast over heads; computed in float32."""
    angles = positions[:, :, None, None] * frequencies
    return Angles(angles.cos().to(rounded_to).to(dtype), angles.sin().to(rounded_to).to(dtype))


class Turns:
    """The rotary angles of a config's layers: of those that see all, and of those with a window."""

    def __init__(self, cfg: LoopedConfig):
        self._kinds = {name: one for name in ("rotary", "rotary_windowed") if (one := getattr(cfg, name)) is not None}
        self._frequencies = {name: component_frequencies(one, cfg.d_head) for name, one in self._kinds.items()}

    def angles(self, positions: Int[Tensor, "rows pos"], dtype: torch.dtype) -> tuple[Angles | None, Angles | None]:
        """Those of all layers but the ones with a window, and of these; None where there is no such embedding."""
        return self._of("rotary", positions, dtype), self._of("rotary_windowed", positions, dtype)

    def _of(self, name: str, positions: Int[Tensor, "rows pos"], dtype: torch.dtype) -> Angles | None:
        frequencies = self._frequencies.get(name)
        if frequencies is None:
            return None
        if frequencies.device != positions.device:
            frequencies = self._frequencies[name] = frequencies.to(positions.device)
        rounded_to = torch.bfloat16 if self._kinds[name].bfloat16 else torch.float32
        return rotary_angles(frequencies, positions, dtype, rounded_to)


def rotate(
    x: Float[Tensor, "batch pos heads d_head"], angles: Angles, style: RotaryStyle
) -> Float[Tensor, "batch pos heads d_head"]:
    """Rotate each pair of components by its angle; the pairs lie side by side ("adjacent") or half a size apart.

    (a, b) -> (a cos - b sin, b cos + a sin): every component times cos, plus its partner times a sine that is negative
    for the first of a pair. Components beyond those that have an angle stay as they are.
    """
    size = angles.cos.shape[-1]
    if size < x.shape[-1]:
        return torch.cat((rotate(x[..., :size], angles, style), x[..., size:]), dim=-1)
    halves = style == "halves"
    partner = x.roll(size // 2, dims=-1) if halves else x.unflatten(-1, (-1, 2)).flip(-1).flatten(-2)
    return x * angles.cos + partner * angles.sin
