"""TwoStateTransformer: two stacks on two timescales, each with a state of its own, with hook points.

z_H = embed(tokens);  z_L = a learned vector
H times:  L times:  z_L = N(L_blocks(z_L + z_H))
          once:     z_H = N(H_blocks(z_H + z_L))
logits = unembed(z_H)

What goes from loop to loop is [z_H ; z_L], z_H first. Loop t of the run is loop t of H_blocks, and of L_blocks the
loops t · L to t · L + L − 1. Either stack has its own sites, of width d_model: its state as it enters
(`hook_state_pre`), the other state (`hook_injection_in`), their sum (`hook_injection`), its state as it leaves
(`hook_state_post`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from tl_looped.engine.config import LoopedConfig
from tl_looped.engine.hooks import HookDict, HookGroup
from tl_looped.engine.network import Frame, Network
from tl_looped.engine.schedule import FAST, SLOW, HookSite
from tl_looped.nn.block import Block
from tl_looped.nn.ends import head, random_weights
from tl_looped.nn.norm import NORMS
from tl_looped.nn.rotary import Turns

_SITES = ("hook_state_pre", "hook_injection_in", "hook_injection", "hook_state_post")


class TwoStateTransformer(Network):
    """A decoder-only transformer of two stacks that loop. Users hold it through `tl_looped.LoopedModel`.

    Args:
        cfg: what to build; its `two_states` says how often the fast stack runs in a loop.
    """

    def __init__(self, cfg: LoopedConfig):
        super().__init__()
        if cfg.two_states is None:
            raise ValueError("a config of one state is a LoopedTransformer's")
        self.cfg = cfg
        self.l_cycles = cfg.two_states.l_cycles
        self.hook_dict = HookDict()
        self.hooks = HookGroup(self.hook_dict, HookSite(""), looped=False, only=("hook_embed",))
        self.embed = nn.Embedding(cfg.d_vocab, cfg.d_model)
        self.state_init = nn.Parameter(torch.zeros(cfg.d_model))  # of z_L
        self.L_blocks = self._stack(FAST)
        self.H_blocks = self._stack(SLOW)
        if cfg.has_final_weights:
            self.ln_final = NORMS[cfg.norm](cfg.d_model, cfg.eps)  # also closes the loops of both stacks
        stacks, hooks = (FAST, SLOW), self.hook_dict
        self.loop_hooks = {one: HookGroup(hooks, HookSite("", one), looped=True, only=_SITES) for one in stacks}
        self.norm_hooks: dict[str, HookGroup] = {}
        if cfg.norms_each_loop:
            sites = {one: HookSite("ln_loop.", one) for one in stacks}
            self.norm_hooks = {one: HookGroup(hooks, site, looped=True) for one, site in sites.items()}
        if cfg.final_norm:
            self.norm_hooks["ln_final"] = HookGroup(hooks, HookSite("ln_final."), looped=False)
        self.unembed = head(cfg, self.embed)
        self._turns = Turns(cfg)

    def _stack(self, name: str) -> nn.ModuleList:
        sites = (HookSite("", name, layer) for layer in range(self.cfg.n_core))
        return nn.ModuleList(Block(self.cfg, self.hook_dict, site, looped=True) for site in sites)

    def reset_parameters(self, seed: int) -> None:
        """Random weights from a seed: see `random_weights`."""
        random_weights(self, seed)

    def frame(
        self,
        visible: Bool[Tensor, "#batch pos key"] | None,
        positions: Int[Tensor, "rows pos"],
        tokens: Int[Tensor, "batch pos"],
        l_cycles: int | None = None,
        step_sizes: Sequence[float] | None = None,
    ) -> Frame:
        """Prepare what all layers of a run share: see `Frame`."""
        angles = self._turns.angles(positions, self.embed.weight.dtype)
        read = tokens if self.cfg.reads_tokens_in_layers else None
        return Frame(positions, *angles, visible, l_cycles=l_cycles or self.l_cycles, tokens=read)

    def needs_input(self, state_given: bool) -> bool:
        """Whether a run reads the tokens: for the initial state alone."""
        return not state_given

    def begin(
        self,
        tokens: Int[Tensor, "batch pos"],
        frame: Frame,
        state: Float[Tensor, "batch pos d_state"] | None,
        start: int = 0,
    ) -> tuple[Float[Tensor, "batch pos d_state"], None]:
        """(the states entering loop `start`, None as no loop reads the tokens), as given, or from the tokens."""
        if state is not None:
            return state, None
        z_h = self.embed(tokens)
        if self.cfg.embed_scale != 1.0:
            z_h = z_h * self.cfg.embed_scale
        z_h = self.hooks.hook_embed(z_h)
        return torch.cat((z_h, self.state_init.expand_as(z_h)), dim=-1), None

    def loop(
        self,
        state: Float[Tensor, "batch pos d_state"],
        e: Float[Tensor, "batch pos d_model"] | None,
        frame: Frame,
        t: int,
        first_layer: int = 0,
    ) -> Float[Tensor, "batch pos d_state"]:
        """One loop: L_blocks as often as the frame says, then H_blocks once; the states that enter it to those leaving.

        What enters H_blocks is shown when the loop begins, as L_blocks read it from there on.
        """
        if first_layer:
            raise ValueError("a loop of two stacks goes on from its beginning only")
        z_h, z_l = state.chunk(2, dim=-1)
        z_h = self.loop_hooks[SLOW].hook_state_pre(z_h, t)
        l_cycles = frame.l_cycles or self.l_cycles
        for loop in range(t * l_cycles, (t + 1) * l_cycles):
            z_l = self.loop_hooks[FAST].hook_state_pre(z_l, loop)
            z_l = self.step(FAST, self.L_blocks, z_l, z_h, frame, loop)
        z_h = self.step(SLOW, self.H_blocks, z_h, z_l, frame, t)
        return torch.cat((z_h, z_l), dim=-1)

    def step(
        self,
        stack: str,
        blocks: nn.ModuleList,
        own: Float[Tensor, "batch pos d_model"],
        other: Float[Tensor, "batch pos d_model"],
        frame: Frame,
        loop: int,
    ) -> Float[Tensor, "batch pos d_model"]:
        """The state that a stack makes of its own and the other one."""
        hooks = self.loop_hooks[stack]
        x = hooks.hook_injection(own + hooks.hook_injection_in(other, loop), loop)
        for block in blocks:
            x = block(x, frame, loop)
        return hooks.hook_state_post(self.close(x, loop, self.norm_hooks.get(stack)), loop)

    def close(
        self, x: Float[Tensor, "*dims d_model"], t: int | None = None, hooks: HookGroup | None = None
    ) -> Float[Tensor, "*dims d_model"]:
        """The norm that closes every loop, where one does; x itself elsewhere. Without `hooks` none sees it."""
        return self.ln_final(x, t, hooks) if self.cfg.norms_each_loop else x

    def read_part(self, state: Float[Tensor, "*rows d_state"]) -> Float[Tensor, "*rows d_model"]:
        """See `Network`: z_H, of both or alone."""
        return state[..., : self.cfg.d_model]

    def finish(self, state: Float[Tensor, "batch pos d_state"], frame: Frame) -> Float[Tensor, "batch pos d_model"]:
        """What the unembedding reads if the model stops with these states, or with this z_H."""
        z_h = self.read_part(state)
        return self.ln_final(z_h, None, self.norm_hooks["ln_final"]) if self.cfg.final_norm else z_h

    def head_input(self, x: Float[Tensor, "*dims d_model"], closed: bool = False) -> Float[Tensor, "*dims d_model"]:
        """What the unembedding reads of a residual stream x if nothing but norms came after it; no hook sees it.

        Args:
            x: vectors of the residual stream.
            closed: whether x is a state, which the norm that closes loops has been applied to.
        """
        return self.ln_final(x) if self.cfg.final_norm or (self.cfg.norms_each_loop and not closed) else x

    @property
    def exit_logit(self) -> Callable[[Float[Tensor, "*rows d_model"]], Float[Tensor, "*rows"]] | None:
        """See `Network`: no gate is trained on two states."""
        return None

    @property
    def head_gain(self) -> Float[Tensor, " d_model"] | None:
        """See `Network`."""
        return self.ln_final.gain() if self.cfg.has_final_weights else None
