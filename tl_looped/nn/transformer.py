"""LoopedTransformer: the (p, k⊗T, c)[I] family in plain PyTorch, with hook points.

e = prelude(embed(tokens))
x = initial state
T times:  x = loop_norm(core(inject(x, e)))          loop_norm only where it closes each loop
logits = unembed(final_norm(coda(loop_norm(x))))     loop_norm here only where it closes the last loop
"""

from __future__ import annotations

import math
from collections.abc import Container
from itertools import islice

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from tl_looped.engine.config import LoopedConfig
from tl_looped.engine.hooks import HookDict, HookGroup
from tl_looped.engine.network import Frame, Network
from tl_looped.engine.schedule import CODA, CORE, PRELUDE, HookSite
from tl_looped.nn.block import Block
from tl_looped.nn.norm import RMSNorm
from tl_looped.nn.rotary import component_frequencies, rotary_angles


class LoopedTransformer(Network):
    """A looped decoder-only transformer. Users hold it through `tl_looped.LoopedModel`, which checks their input.

    Args:
        cfg: what to build.
    """

    def __init__(self, cfg: LoopedConfig):
        super().__init__()
        self.cfg = cfg
        self.hook_dict = HookDict()
        self.hooks = self._group("", looped=False)
        self.embed = nn.Embedding(cfg.d_vocab, cfg.d_model)
        self.prelude = self._stack(PRELUDE, cfg.n_prelude, looped=False)
        absent = {"hook_injection_in": cfg.injection == "none", "hook_exit_gate": not cfg.exit_gate}
        self.loop_hooks = self._group("", looped=True, without=[name for name, is_so in absent.items() if is_so])
        if cfg.injection == "concat_linear":
            self.injection = nn.Linear(2 * cfg.d_model, cfg.d_model, bias=False)
        self.blocks = self._stack(CORE, cfg.n_core, looped=True)
        self.loop_norm_hooks = self._group("ln_loop.", looped=True) if cfg.loop_norm == "each" else None
        if cfg.exit_gate:
            self.exit_gate = nn.Linear(cfg.d_model, 1)
        self.coda_norm_hooks = self._group("ln_coda.", looped=False) if cfg.loop_norm == "last" else None
        self.coda = self._stack(CODA, cfg.n_coda, looped=False)
        if cfg.loop_norm != "none" or cfg.final_norm:
            hooks = self._group("ln_final.", looped=False) if cfg.final_norm else None
            self.ln_final = RMSNorm(cfg.d_model, cfg.eps, hooks)
        self.unembed = nn.Linear(cfg.d_model, cfg.d_vocab, bias=False)
        if cfg.tie_embeddings:
            self.unembed.weight = self.embed.weight
        self._frequencies = component_frequencies(cfg)

    def _group(self, prefix: str, looped: bool, without: Container[str] = ()) -> HookGroup:
        # ln_loop and ln_coda are the final norm's weights at other sites, with hook points of their own.
        return HookGroup(self.hook_dict, HookSite(prefix), looped, without)

    def _stack(self, name: str, n_layers: int, looped: bool) -> nn.ModuleList:
        sites = (HookSite("", name, layer) for layer in range(n_layers))
        return nn.ModuleList(Block(self.cfg, self.hook_dict, site, looped) for site in sites)

    @torch.no_grad()
    def reset_parameters(self, seed: int) -> None:
        """Random weights from a seed, the same on every device.

        Matrices N(0, 1/fan_in), embedding N(0, 1), norms one, biases zero: streams of order one at any width. Embedding
        and head stay one tensor where they are tied.
        """
        generator = torch.Generator().manual_seed(seed)
        for name, weight in self.named_parameters():
            if weight.ndim == 1:
                weight.fill_(0.0 if name.endswith("bias") else 1.0)
            else:
                std = 1.0 if name == "embed.weight" else 1 / math.sqrt(weight.shape[1])
                weight.copy_(torch.randn(weight.shape, generator=generator) * std)

    def frame(self, visible: Bool[Tensor, "#batch pos key"] | None, positions: Int[Tensor, "rows pos"]) -> Frame:
        """Prepare what all layers of a run share: see `Frame`."""
        dtype = self.embed.weight.dtype
        if self._frequencies.device != positions.device:
            self._frequencies = self._frequencies.to(positions.device)
        cos, sin = rotary_angles(self._frequencies, positions)
        return Frame(cos.to(dtype), sin.to(dtype), visible)

    def read(self, tokens: Int[Tensor, "batch pos"], frame: Frame) -> Float[Tensor, "batch pos d_model"]:
        """e: the embedded tokens after the prelude."""
        x = self.embed(tokens)
        if self.cfg.embed_scale != 1.0:
            x = x * self.cfg.embed_scale
        x = self.hooks.hook_embed(x)
        for block in self.prelude:
            x = block(x, frame)
        return x

    def enter(
        self, state: Float[Tensor, "batch pos d_model"], e: Float[Tensor, "batch pos d_model"] | None, t: int
    ) -> Float[Tensor, "batch pos d_model"]:
        """What the first core layer reads in loop t: the state, mixed with the prelude's output as the config says."""
        x = self.loop_hooks.hook_state_pre(state, t)
        if self.cfg.injection != "none" and e is not None:
            e = self.loop_hooks.hook_injection_in(e, t)
            x = x + e if self.cfg.injection == "add" else self.injection(torch.cat((x, e), dim=-1))
        return self.loop_hooks.hook_injection(x, t)

    def loop(
        self,
        state: Float[Tensor, "batch pos d_model"],
        e: Float[Tensor, "batch pos d_model"] | None,
        frame: Frame,
        t: int,
        first_layer: int = 0,
    ) -> Float[Tensor, "batch pos d_model"]:
        """One pass through the core: the state entering loop t to the state leaving it.

        With `first_layer` above 0 it goes on from the middle: `state` is what that layer reads.
        """
        x = self.enter(state, e, t) if first_layer == 0 else state
        for block in islice(self.blocks, first_layer, None):  # a slice would be a new ModuleList
            x = block(x, frame, t)
        if self.loop_norm_hooks is not None:
            x = self.ln_final(x, t, self.loop_norm_hooks)
        x = self.loop_hooks.hook_state_post(x, t)
        if self.cfg.exit_gate and self.loop_hooks.hook_exit_gate.wants(t):
            self.loop_hooks.hook_exit_gate(self.exit_gate(x).squeeze(-1), t)
        return x

    def finish(self, state: Float[Tensor, "batch pos d_model"], frame: Frame) -> Float[Tensor, "batch pos d_model"]:
        """What the unembedding reads if the model stops with this state: after the coda and the final norm."""
        x = state
        if self.coda_norm_hooks is not None:
            x = self.ln_final(x, None, self.coda_norm_hooks)
        for block in self.coda:
            x = block(x, frame)
        return self.ln_final(x) if self.cfg.final_norm else x

    def needs_input(self, state_given: bool) -> bool:
        """Whether a run reads the tokens: for the initial state, or for the injection."""
        return self.cfg.injection != "none" or not state_given

    def begin(
        self,
        tokens: Int[Tensor, "batch pos"],
        frame: Frame,
        state: Float[Tensor, "batch pos d_model"] | None,
        start: int = 0,
    ) -> tuple[Float[Tensor, "batch pos d_model"], Float[Tensor, "batch pos d_model"] | None]:
        """(the state entering loop `start`, e or None where no loop reads it), from `state`, or from e without one."""
        e = self.read(tokens, frame) if self.needs_input(state is not None) else None
        x = e if state is None else state
        if x is None:
            raise ValueError("unreachable: a run without a state reads the tokens")
        return (self.hooks.hook_state_init(x) if start == 0 else x), e
