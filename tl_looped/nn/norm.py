"""Root-mean-square norm with TransformerLens's hook points."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn

from tl_looped.hooks import HookGroup

NORM_HOOKS = ("hook_scale", "hook_normalized")


class RMSNorm(nn.Module):
    r"""y = w · x / s, with s = sqrt(mean(x²) + eps), computed in float32 at least and cast back.

    `hook_scale` is s, [batch, pos, 1]; `hook_normalized` is x / s before the weight, as in TransformerLens.

    Args:
        size: length of the vectors.
        eps: added to the mean square.
        hooks: its hook points, or None for a norm without any. A norm whose weights serve several sites is called with
            the hook points of the site.
    """

    def __init__(self, size: int, eps: float, hooks: HookGroup | None = None):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps
        self.hooks = hooks

    def forward(
        self, x: Float[Tensor, "*dims d"], loop: int | None = None, hooks: HookGroup | None = None
    ) -> Float[Tensor, "*dims d"]:
        """Normalise the last axis."""
        hooks = hooks or self.hooks
        wide = x if x.dtype == torch.float64 else x.float()
        scale = (wide.pow(2).mean(-1, keepdim=True) + self.eps).sqrt()
        if hooks is None:
            return (wide / scale).to(x.dtype) * self.weight
        normalized = hooks.hook_normalized(wide / hooks.hook_scale(scale, loop), loop)
        return normalized.to(x.dtype) * self.weight
