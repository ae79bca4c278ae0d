"""Rotary position embedding: both pairings, both directions, and scalings of the frequencies."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_looped.engine.config import LoopedConfig
from tl_looped.engine.network import Angles
from tl_looped.engine.parts import DynamicRope, LinearRope, Llama3Rope, Rotary, RotaryStyle, YarnRope


def inverse_frequencies(rotary: Rotary, d_head: int) -> Float[Tensor, " half"]:
    """Radians per position of each pair: base^(-2i / size), scaled; float32, on the CPU.

    Scaling that depends on a prompt's length is left out, see `Turns`.
    """
    size = rotary.size or d_head
    exponents = torch.arange(0, size, 2, dtype=torch.float32, device="cpu") / size
    frequencies = 1.0 / rotary.base**exponents
    if isinstance(rotary.scaling, Llama3Rope):
        return _llama3(frequencies, rotary.scaling)
    if isinstance(rotary.scaling, YarnRope):
        return _yarn(frequencies, rotary.base, rotary.scaling)
    return frequencies / rotary.scaling.factor if isinstance(rotary.scaling, LinearRope) else frequencies


def _llama3(frequencies: Float[Tensor, " half"], scaling: Llama3Rope) -> Float[Tensor, " half"]:
    """Long wavelengths are stretched by `factor`, short ones kept, those between interpolated."""
    turns = scaling.original_n_ctx * frequencies / (2 * math.pi)  # full turns within the original context
    span = scaling.high_freq_factor - scaling.low_freq_factor
    keep = ((turns - scaling.low_freq_factor) / span).clamp(0.0, 1.0)
    return frequencies * (keep + (1 - keep) / scaling.factor)


def _yarn(frequencies: Float[Tensor, " half"], base: float, scaling: YarnRope) -> Float[Tensor, " half"]:
    """Quick pairs keep their frequency, slow ones are stretched by `factor`, those between interpolated by index."""
    size = 2 * len(frequencies)

    def pair(turns: float) -> float:
        """The pair that makes so many full turns within the original context, as a number between indices."""
        return size * math.log(scaling.original_n_ctx / (turns * 2 * math.pi)) / (2 * math.log(base))

    low, high = pair(scaling.beta_fast), pair(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, size - 1)
    high = high + 0.001 if low == high else high
    keep = 1 - ((torch.arange(len(frequencies), dtype=torch.float32, device="cpu") - low) / (high - low)).clamp(0, 1)
    return frequencies / scaling.factor * (1 - keep) + frequencies * keep


def component_frequencies(rotary: Rotary, d_head: int) -> Float[Tensor, " size"]:
    """Radians per position of each component, as `rotate` wants them: the first of a pair turns backward."""
    signs = torch.tensor([1.0, -1.0] if rotary.reversed else [-1.0, 1.0], device="cpu")
    pairs = inverse_frequencies(rotary, d_head)[:, None] * signs
    return pairs.T.flatten() if rotary.style == "halves" else pairs.flatten()


def rotary_angles(
    rotary: Rotary,
    frequencies: Float[Tensor, " size"],
    positions: Int[Tensor, "rows pos"],
    dtype: torch.dtype,
) -> Angles:
    """Cosine and sine for every position and component, broadcast over heads; computed in float32.

    Args:
        rotary: whose they are.
        frequencies: of `component_frequencies`, on the positions' device.
        positions: of the tokens.
        dtype: of the result.
    """
    turns = frequencies
    if isinstance(rotary.scaling, DynamicRope):
        turns = turns * _slower(rotary, rotary.scaling, positions, len(frequencies))
    angles, factor = positions[:, :, None, None] * turns, rotary.attention_factor
    rounded_to = torch.bfloat16 if rotary.bfloat16 else torch.float32
    cos, sin = ((factor * one if factor != 1 else one).to(rounded_to).to(dtype) for one in (angles.cos(), angles.sin()))
    return Angles(cos, sin)


def _slower(
    rotary: Rotary, scaling: DynamicRope, positions: Int[Tensor, "rows pos"], size: int
) -> Float[Tensor, "rows 1 1 size"]:
    """By what each component of a row turns more slowly, as its length has the base grow."""
    length = (positions.amax(1) + 1).clamp(min=scaling.original_n_ctx)
    growth = scaling.factor * length / scaling.original_n_ctx - (scaling.factor - 1)
    index = torch.arange(size // 2, device=positions.device)
    pairs = index.repeat(2) if rotary.style == "halves" else index.repeat_interleave(2)
    return growth[:, None, None, None] ** (-2 * pairs / (size - 2))


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
        return rotary_angles(self._kinds[name], frequencies, positions, dtype)


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
