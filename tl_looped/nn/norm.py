"""Norms, with TransformerLens's hook points."""

from __future__ import annotations

from typing import NoReturn

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from tl_looped.engine.errors import InputError
from tl_looped.engine.hooks import HookGroup, settle
from tl_looped.engine.numbers import wide
from tl_looped.engine.parts import NormKind


class Norm(nn.Module):
    r"""y = affine((x − m) / s), computed in float32 at least and cast back; m, s and the affine map are the kind's.

    `hook_scale` is s, [batch, pos, 1]; `hook_normalized` is (x − m) / s before the weights, as in TransformerLens. As
    in attention, the fused norm of torch computes the output, and the two are formed beside it only where they are
    hooked. A norm has no hook points of its own, as one may serve several sites: a call brings those of the site, and
    a call without any is not seen by hooks.

    Args:
        size: length of the vectors.
        eps: added to the mean square or the variance, the same in every number format.
    """

    def __init__(self, size: int, eps: float):
        super().__init__()
        self.size = size
        self.eps = eps

    def forward(
        self, x: Float[Tensor, "*dims d"], loop: int | None = None, hooks: HookGroup | None = None
    ) -> Float[Tensor, "*dims d"]:
        """Normalise the last axis."""
        out = self.fused(x)
        if hooks is not None and (hooks.hook_scale.wants(loop) or hooks.hook_normalized.wants(loop)):
            return self._through_scale(out, x, loop, hooks)
        return out

    def fused(self, x: Float[Tensor, "*dims d"]) -> Float[Tensor, "*dims d"]:
        """The whole norm at once."""
        raise NotImplementedError

    def centred(self, x: Float[Tensor, "*dims d"]) -> Float[Tensor, "*dims d"]:
        """What is divided: x itself, or x less its mean."""
        return x

    def gain(self) -> Float[Tensor, " d"] | None:
        """What every component is multiplied by; None where there are no weights."""
        return None

    @property
    def w(self) -> Float[Tensor, " d"] | None:
        """TransformerLens's word for `gain`."""
        return self.gain()

    @property
    def hook_scale(self) -> NoReturn:
        """Refused, as is `hook_normalized`: a norm may serve several sites, each with points of its own."""
        raise InputError(
            'a norm may serve several sites: hook one of them, model.hook_dict["blocks.0.ln1.hook_scale"].'
        )

    hook_normalized = hook_scale

    def affine(self, normalized: Float[Tensor, "*dims d"]) -> Float[Tensor, "*dims d"]:
        """What the weights make of the normalised vectors."""
        gain = self.gain()
        return normalized if gain is None else normalized * gain

    def _through_scale(
        self, out: Float[Tensor, "*dims d"], x: Float[Tensor, "*dims d"], loop: int | None, hooks: HookGroup
    ) -> Float[Tensor, "*dims d"]:
        """Show the scale and the normalised vectors to their hooks; the given output, unless a hook changed them."""
        x_wide = self.centred(wide(x))
        scale = (x_wide.pow(2).mean(-1, keepdim=True) + self.eps).sqrt()
        scale, scale_changed = hooks.hook_scale.fire(scale, loop)
        normalized, normalized_changed = hooks.hook_normalized.fire(x_wide / scale, loop)
        return settle(out, lambda: self.affine(normalized.to(x.dtype)).to(x.dtype), scale_changed, normalized_changed)


class Weightless(Norm):
    """x / sqrt(mean(x²) + eps)."""

    def fused(self, x: Float[Tensor, "*dims d"]) -> Float[Tensor, "*dims d"]:
        """See the class."""
        return F.rms_norm(x, x.shape[-1:], None, self.eps)


class RMSNorm(Norm):
    """w · x / sqrt(mean(x²) + eps)."""

    def __init__(self, size: int, eps: float):
        super().__init__(size, eps)
        self.weight = nn.Parameter(torch.ones(size))

    def fused(self, x: Float[Tensor, "*dims d"]) -> Float[Tensor, "*dims d"]:
        """See the class."""
        return F.rms_norm(x, x.shape[-1:], self.weight, self.eps)

    def gain(self) -> Float[Tensor, " d"]:
        """The weight."""
        return self.weight


class PlusOneRMSNorm(RMSNorm):
    """(1 + w) · x / sqrt(mean(x²) + eps); the sum is formed in float32 at least."""

    def __init__(self, size: int, eps: float):
        super().__init__(size, eps)
        nn.init.zeros_(self.weight)

    def fused(self, x: Float[Tensor, "*dims d"]) -> Float[Tensor, "*dims d"]:
        """See the class."""
        return F.rms_norm(wide(x), x.shape[-1:], self.gain(), self.eps).to(x.dtype)

    def gain(self) -> Float[Tensor, " d"]:
        """One more than the weight."""
        return 1 + wide(self.weight)


class CentredNorm(RMSNorm):
    """w · (x − mean(x)) / sqrt(var(x) + eps)."""

    def fused(self, x: Float[Tensor, "*dims d"]) -> Float[Tensor, "*dims d"]:
        """See the class."""
        return F.layer_norm(x, x.shape[-1:], self.weight, None, self.eps)

    def centred(self, x: Float[Tensor, "*dims d"]) -> Float[Tensor, "*dims d"]:
        """X less its mean."""
        return x - x.mean(-1, keepdim=True)


class LayerNorm(CentredNorm):
    """w · (x − mean(x)) / sqrt(var(x) + eps) + b."""

    def __init__(self, size: int, eps: float):
        super().__init__(size, eps)
        self.bias = nn.Parameter(torch.zeros(size))

    def fused(self, x: Float[Tensor, "*dims d"]) -> Float[Tensor, "*dims d"]:
        """See the class."""
        return F.layer_norm(x, x.shape[-1:], self.weight, self.bias, self.eps)

    def affine(self, normalized: Float[Tensor, "*dims d"]) -> Float[Tensor, "*dims d"]:
        """Times the weight, plus the bias."""
        return normalized * self.weight + self.bias


NORMS: dict[NormKind, type[Norm]] = {
    "rms": RMSNorm,
    "rms_plus_one": PlusOneRMSNorm,
    "weightless": Weightless,
    "layer": LayerNorm,
    "layer_no_bias": CentredNorm,
}
