"""One transformer layer, in the five placements of its norms."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from tl_looped.engine.config import LoopedConfig
from tl_looped.engine.hooks import HookDict, HookGroup, settle, with_hook_points
from tl_looped.engine.network import Frame, bias_of, matrix
from tl_looped.engine.parts import ActFn
from tl_looped.engine.schedule import HookSite
from tl_looped.nn.attention import Attention
from tl_looped.nn.norm import NORMS, Norm
from tl_looped.nn.time import Modulation

ACTS: dict[ActFn, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "relu2": lambda x: F.relu(x).square(),
    "half_relu2": lambda x: F.relu(x).square() / 2,
}


@with_hook_points("mlp.")
class MLP(nn.Module):
    """down(act(gate(x)) · up(x)), or without a gate down(act(up(x))).

    TransformerLens's pre is what the activation function reads, pre_linear what it is multiplied by, post what down
    reads.
    """

    def __init__(self, cfg: LoopedConfig, registry: HookDict, site: HookSite, looped: bool):
        super().__init__()
        without = () if cfg.gated_mlp else ("hook_pre_linear",)
        self.hooks = HookGroup(registry, HookSite("mlp.", site.stack, site.layer), looped, without)
        self.act = ACTS[cfg.act_fn]
        self.gated = cfg.gated_mlp
        if self.gated:
            self.gate = nn.Linear(cfg.d_model, cfg.d_mlp, bias=cfg.mlp_bias)
        self.up = nn.Linear(cfg.d_model, cfg.d_mlp, bias=cfg.mlp_bias)
        self.down = nn.Linear(cfg.d_mlp, cfg.d_model, bias=cfg.mlp_bias)

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

    @property
    def b_in(self) -> Float[Tensor, " d_mlp"]:
        """Input bias, zeros where there is none, as is `b_out`."""
        return bias_of(self.up)

    @property
    def b_out(self) -> Float[Tensor, " d_model"]:
        """Output bias."""
        return bias_of(self.down)

    def forward(self, x: Float[Tensor, "batch pos d_model"], loop: int | None) -> Float[Tensor, "batch pos d_model"]:
        """Apply to every position."""
        if self.gated:
            pre = self.hooks.hook_pre(self.gate(x), loop)
            pre_linear = self.hooks.hook_pre_linear(self.up(x), loop)
            return self.down(self.hooks.hook_post(self.act(pre) * pre_linear, loop))
        return self.down(self.hooks.hook_post(self.act(self.hooks.hook_pre(self.up(x), loop)), loop))


@with_hook_points("")
class Block(nn.Module):
    """Attention and MLP, each with the norms that `cfg.norm_placement` puts before and after it.

    `ln1`, `ln2` come before attention and MLP, `ln1_post`, `ln2_post` after. `hook_attn_out` and `hook_mlp_out` are
    what is added to the stream, so after an output norm. In a residual sandwich, and with norms
    after ("post"), the norm comes after the sum, so there, and only there, resid_mid is not resid_pre + attn_out.
    """

    ln1: Norm
    ln2: Norm
    ln1_post: Norm
    ln2_post: Norm

    def __init__(self, cfg: LoopedConfig, registry: HookDict, site: HookSite, looped: bool):
        super().__init__()
        self.before = cfg.norm_placement not in ("output", "post")
        self.after = cfg.norm_placement in ("output", "output_sandwich")  # a norm on what a sub-layer gives
        self.on_stream = cfg.norm_placement in ("residual_sandwich", "post")  # a norm on the stream with it
        self.modulated = cfg.loop_time and looped
        self.hooks = HookGroup(registry, site, looped, () if self.modulated else ("hook_modulation",))
        if self.modulated:
            self.modulation = nn.Linear(cfg.d_model, len(Modulation._fields) * cfg.d_model)
        self.attn = Attention(cfg, registry, site, looped)
        self.mlp = MLP(cfg, registry, site, looped)
        self.norm_hooks: dict[str, HookGroup] = {}
        names = ["ln1", "ln2"] if self.before else []
        for name in [*names, *(["ln1_post", "ln2_post"] if self.after or self.on_stream else [])]:
            self.add_module(name, NORMS[cfg.norm](cfg.d_model, cfg.eps))
            without = () if self.modulated else ("hook_modulated",)
            self.norm_hooks[name] = HookGroup(registry, HookSite(f"{name}.", site.stack, site.layer), looped, without)

    def share(self, other: Block) -> None:
        """Be the same layer as another at sites of its own: with its maps and norms in place of one's own."""
        # The very tables of modules, so that what takes a map's place in one, as an adapter does, is in the other too.
        self.attn._modules, self.mlp._modules = other.attn._modules, other.mlp._modules
        for name in self.norm_hooks:
            self.add_module(name, other.get_submodule(name))

    @property
    def query_input(self) -> tuple[str, Callable[[Tensor], Tensor]]:
        """What W_Q, W_K and W_V read: a site of the layer, and a function of the activation there."""
        if self.before and not self.modulated:
            return "ln1.hook_normalized", self.ln1.affine
        return "ln1.hook_modulated" if self.modulated else "hook_resid_pre", lambda x: x

    @property
    def neuron_gain(self) -> Float[Tensor, " d_model"] | None:
        """What multiplies every component that an MLP neuron writes, before it is added; None where nothing does."""
        return self.ln2_post.gain() if self.after or self.on_stream else None

    def _modulation(self, x: Float[Tensor, "batch pos d_model"], frame: Frame, loop: int | None) -> Modulation:
        """By what the loop's time gates and scales this layer: every position alike, unless a hook says otherwise."""
        if frame.condition is None:
            raise ValueError("unreachable: a model whose loops have a time gives it to its layers")
        value, seen, changed = frame.condition
        found = self.modulation(F.silu(value))
        if seen is not None and changed is not None:
            found = settle(found.expand(*x.shape[:2], -1), lambda: self.modulation(F.silu(seen)), changed)
        if self.hooks.hook_modulation.wants(loop):
            found = self.hooks.hook_modulation(found.expand(*x.shape[:2], -1), loop)
        return Modulation(*found.chunk(len(Modulation._fields), dim=-1))

    def forward(
        self, x: Float[Tensor, "batch pos d_model"], frame: Frame, loop: int | None = None
    ) -> Float[Tensor, "batch pos d_model"]:
        """From resid_pre to resid_post; `loop` is None in a stack that runs once."""
        hooks, norm_hooks = self.hooks, self.norm_hooks
        x = hooks.hook_resid_pre(x, loop)
        by = self._modulation(x, frame, loop) if self.modulated else None
        read = self.ln1(x, loop, norm_hooks["ln1"]) if self.before else x
        if by is not None:
            read = norm_hooks["ln1"].hook_modulated(read * (1 + by.scale_attn), loop)
        out = self.attn(read, frame, loop)
        out = out if by is None else by.gate_attn * out
        out = hooks.hook_attn_out(self.ln1_post(out, loop, norm_hooks["ln1_post"]) if self.after else out, loop)
        x = x + out
        if self.on_stream:
            x = self.ln1_post(x, loop, norm_hooks["ln1_post"])
        x = hooks.hook_resid_mid(x, loop)
        read = self.ln2(x, loop, norm_hooks["ln2"]) if self.before else x
        if by is not None:
            read = norm_hooks["ln2"].hook_modulated(read * (1 + by.scale_mlp), loop)
        out = self.mlp(read, loop)
        out = out if by is None else by.gate_mlp * out
        out = hooks.hook_mlp_out(self.ln2_post(out, loop, norm_hooks["ln2_post"]) if self.after else out, loop)
        x = x + out
        if self.on_stream:
            x = self.ln2_post(x, loop, norm_hooks["ln2_post"])
        return hooks.hook_resid_post(x, loop)
