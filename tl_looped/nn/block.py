"""One transformer layer, in the four placements of its norms."""

from __future__ import annotations

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from tl_looped.engine.config import LoopedConfig
from tl_looped.engine.hooks import HookDict, HookGroup
from tl_looped.engine.network import Frame, matrix
from tl_looped.engine.schedule import HookSite
from tl_looped.nn.attention import Attention
from tl_looped.nn.norm import RMSNorm


class MLP(nn.Module):
    """down(silu(gate(x)) * up(x)). TransformerLens's pre and pre_linear are gate and up, post the product."""

    def __init__(self, cfg: LoopedConfig, registry: HookDict, site: HookSite, looped: bool):
        super().__init__()
        self.hooks = HookGroup(registry, HookSite("mlp.", site.stack, site.layer), looped)
        self.gate = nn.Linear(cfg.d_model, cfg.d_mlp, bias=False)
        self.up = nn.Linear(cfg.d_model, cfg.d_mlp, bias=False)
        self.down = nn.Linear(cfg.d_mlp, cfg.d_model, bias=False)

    @property
    def W_gate(self) -> Float[Tensor, "d_model d_mlp"]:
        """Gate weights, a view."""
        return matrix(self.gate, "mlp.gate").T

    @property
    def W_in(self) -> Float[Tensor, "d_model d_mlp"]:
        """Input weights, a view."""
        return matrix(self.up, "mlp.up").T

    @property
    def W_out(self) -> Float[Tensor, "d_mlp d_model"]:
        """Output weights, a view."""
        return matrix(self.down, "mlp.down").T

    def forward(self, x: Float[Tensor, "batch pos d_model"], loop: int | None) -> Float[Tensor, "batch pos d_model"]:
        """Apply to every position."""
        pre = self.hooks.hook_pre(self.gate(x), loop)
        pre_linear = self.hooks.hook_pre_linear(self.up(x), loop)
        return self.down(self.hooks.hook_post(F.silu(pre) * pre_linear, loop))


class Block(nn.Module):
    """Attention and MLP, each with the norms that `cfg.norm_placement` puts before and after it.

    `ln1`, `ln2` come before attention and MLP, `ln1_post`, `ln2_post` after. `hook_attn_out` and `hook_mlp_out` are
    what is added to the stream, so after an output norm. In a residual sandwich the norm comes after the sum, so there,
    and only there, resid_mid is not resid_pre + attn_out.
    """

    def __init__(self, cfg: LoopedConfig, registry: HookDict, site: HookSite, looped: bool):
        super().__init__()

        def norm(name: str) -> RMSNorm:
            hooks = HookGroup(registry, HookSite(f"{name}.", site.stack, site.layer), looped)
            return RMSNorm(cfg.d_model, cfg.eps, hooks)

        self.placement = cfg.norm_placement
        self.hooks = HookGroup(registry, site, looped)
        self.attn = Attention(cfg, registry, site, looped)
        self.mlp = MLP(cfg, registry, site, looped)
        if self.placement != "output":
            self.ln1, self.ln2 = norm("ln1"), norm("ln2")
        if self.placement != "pre":
            self.ln1_post, self.ln2_post = norm("ln1_post"), norm("ln2_post")

    def forward(
        self, x: Float[Tensor, "batch pos d_model"], frame: Frame, loop: int | None = None
    ) -> Float[Tensor, "batch pos d_model"]:
        """From resid_pre to resid_post; `loop` is None in a stack that runs once."""
        hooks, before, after = self.hooks, self.placement != "output", self.placement in ("output", "output_sandwich")
        x = hooks.hook_resid_pre(x, loop)
        out = self.attn(self.ln1(x, loop) if before else x, frame, loop)
        out = hooks.hook_attn_out(self.ln1_post(out, loop) if after else out, loop)
        x = x + out
        if self.placement == "residual_sandwich":
            x = self.ln1_post(x, loop)
        x = hooks.hook_resid_mid(x, loop)
        out = self.mlp(self.ln2(x, loop) if before else x, loop)
        out = hooks.hook_mlp_out(self.ln2_post(out, loop) if after else out, loop)
        x = x + out
        if self.placement == "residual_sandwich":
            x = self.ln2_post(x, loop)
        return hooks.hook_resid_post(x, loop)
