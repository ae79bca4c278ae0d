"""Root-mean-square norm with TransformerLens's hook points."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from tl_looped.engine.hooks import HookGroup, settle
from tl_looped.engine.numbers import wide


class RMSNorm(nn.Module):
    r"""y = w · x / s, with s = sqrt(mean(x²) + eps), computed in float32 at least and cast back.

    `hook_scale` is s, [batch, pos, 1]; `hook_normalized` is x / s before the weight, as in TransformerLens. As in
    attention, the fused norm of torch computes the output, and the two are formed beside it only where they are hooked.

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
        out = F.rms_norm(x, x.shape[-1:], self.weight, self.eps)
        if hooks is not None and (hooks.hook_scale.wants(loop) or hooks.hook_normalized.wants(loop)):
            return self._through_scale(out, x, loop, hooks)
        return out

    def _through_scale(
        self, out: Float[Tensor, "*dims d"], x: Float[Tensor, "*dims d"], loop: int | None, hooks: HookGroup
    ) -> Float[Tensor, "*dims d"]:
        """Show the scale and the normalised vectors to their hooks; the given output, unless a hook changed them."""
        x_wide = wide(x)
        scale = (x_wide.pow(2).mean(-1, keepdim=True) + self.eps).sqrt()
        scale, scale_changed = hooks.hook_scale.fire(scale, loop)
        normalized, normalized_changed = hooks.hook_normalized.fire(x_wide / scale, loop)
        return settle(out, lambda: normalized.to(x.dtype) * self.weight, scale_changed, normalized_changed)
