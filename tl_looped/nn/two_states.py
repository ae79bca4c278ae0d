"""TwoStateTransformer: two stacks on two timescales, each with a state of its own, with hook points.

e = embed(tokens)
z_H = e, or a learned vector;  z_L = a learned vector
H times:  L times:  z_L = N(L_blocks(z_L + z_H)), or with an injection N(L_blocks(z_L + (z_H + e)))
          once:     z_H = N(H_blocks(z_H + z_L))
logits = unembed(z_H)

What goes from loop to loop is [z_H ; z_L], z_H first. Loop t of the run is loop t of H_blocks, and of L_blocks the
loops t · L to t · L + L − 1. Either stack has its own sites, of width d_model: its state as it enters
(`hook_state_pre`), the other state, with e where that is injected (`hook_injection_in`), their sum
(`hook_injection`), its state as it leaves (`hook_state_post`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import cast

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from tl_looped.engine.config import LoopedConfig
from tl_looped.engine.hooks import HookDict, HookGroup
from tl_looped.engine.network import Course, Frame, Network
from tl_looped.engine.schedule import FAST, SLOW, HookSite, Pass
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
        self.h_init: nn.Parameter | None = None
        if cfg.two_states is None:
            raise ValueError("a config of one state is a LoopedTransformer's")
        self.cfg = cfg
        self.l_cycles = cfg.two_states.l_cycles
        self.hook_dict = HookDict()
        self.hooks = HookGroup(self.hook_dict, HookSite(""), looped=False, only=("hook_embed",))
        self.embed = nn.Embedding(cfg.d_vocab, cfg.d_model)
        if cfg.puzzles is not None:
            self.puzzles = nn.Embedding(cfg.puzzles.n, cfg.puzzles.size)
        self.state_init = nn.Parameter(torch.zeros(cfg.d_model))  # of z_L
        if cfg.two_states.h_start == "vector":
            self.h_init = nn.Parameter(torch.zeros(cfg.d_model))
        self.L_blocks = self._stack(FAST)
        self.H_blocks = self._stack(SLOW)
        if cfg.two_states.one_net:
            for slow, fast in zip(self.H_blocks, self.L_blocks, strict=True):
                cast(Block, slow).share(cast(Block, fast))
        if cfg.halt_gate:
            self.halt_gate = nn.Linear(cfg.d_model, 2)
        if cfg.has_final_weights:
            self.ln_final = NORMS[cfg.norm](cfg.d_model, cfg.eps)  # also closes the loops of both stacks
        stacks, hooks = (FAST, SLOW), self.hook_dict
        sites = {FAST: _SITES, SLOW: (*_SITES, *(["hook_halt_gate"] if cfg.halt_gate else []))}
        self.loop_hooks = {one: HookGroup(hooks, HookSite("", one), looped=True, only=sites[one]) for one in stacks}
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

    def begin(
        self,
        tokens: Int[Tensor, "batch pos"],
        frame: Frame,
        state: Float[Tensor, "batch pos d_state"] | None,
        start: int = 0,
    ) -> tuple[Float[Tensor, "batch pos d_state"], Float[Tensor, "batch pos d_model"] | None]:
        """(the states entering loop `start`, e or None where no loop reads it), as given, or from the tokens."""
        e = self.read(tokens, frame) if self.needs_input(state is not None) else None
        if state is None:
            read = cast(Tensor, e)
            z_h = read if self.h_init is None else self.h_init.expand_as(read)
            state = torch.cat((z_h, self.state_init.expand_as(read)), dim=-1)
        return state, e if self.cfg.reads_input_in_loops else None

    def read(self, tokens: Int[Tensor, "batch pos"], frame: Frame) -> Float[Tensor, "batch pos d_model"]:
        """e: the embedded tokens, and rows of puzzles."""
        puzzles, d_vocab = self.cfg.puzzles, self.cfg.d_vocab
        if puzzles is None:
            x = self.embed(tokens)
        else:
            row = (tokens - d_vocab).clamp(min=0)
            numbers = self.puzzles(row // puzzles.rows)
            rows = nn.functional.pad(numbers, (0, puzzles.rows * self.cfg.d_model - puzzles.size))
            rows = rows.unflatten(-1, (puzzles.rows, -1))
            place = (row % puzzles.rows)[..., None, None].expand(-1, -1, 1, self.cfg.d_model)
            of_puzzles = rows.gather(2, place).squeeze(2)
            x = torch.where((tokens < d_vocab)[..., None], self.embed(tokens.clamp(max=d_vocab - 1)), of_puzzles)
        return self.hooks.hook_embed(x if self.cfg.embed_scale == 1.0 else x * self.cfg.embed_scale)

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
            z_l = self.step(FAST, self.L_blocks, z_l, z_h if e is None else z_h + e, frame, loop)
        z_h = self.step(SLOW, self.H_blocks, z_h, z_l, frame, t)
        self._show_halting(z_h, t)
        return torch.cat((z_h, z_l), dim=-1)

    def step(
        self,
        stack: str,
        blocks: Iterable[Callable[..., Tensor]],
        own: Float[Tensor, "batch pos d_model"],
        other: Float[Tensor, "batch pos d_model"],
        frame: Frame,
        loop: int,
    ) -> Float[Tensor, "batch pos d_model"]:
        """The state that a stack makes of its own and the other one."""
        x = self._enter(stack, own, other, loop)
        for block in blocks:
            x = block(x, frame, loop)
        return self._leave(stack, x, loop)

    def _enter(
        self, stack: str, own: Float[Tensor, "batch pos d_model"], other: Float[Tensor, "batch pos d_model"], loop: int
    ) -> Float[Tensor, "batch pos d_model"]:
        hooks = self.loop_hooks[stack]
        return hooks.hook_injection(own + hooks.hook_injection_in(other, loop), loop)

    def _leave(
        self, stack: str, x: Float[Tensor, "batch pos d_model"], loop: int
    ) -> Float[Tensor, "batch pos d_model"]:
        return self.loop_hooks[stack].hook_state_post(self.close(x, loop, self.norm_hooks.get(stack)), loop)

    def _show_halting(self, z_h: Float[Tensor, "batch pos d_model"], t: int) -> None:
        if self.cfg.halt_gate and self.loop_hooks[SLOW].hook_halt_gate.wants(t):
            self.loop_hooks[SLOW].hook_halt_gate(self.halt_gate(z_h), t)

    def lead_in(self, one: Pass, course: Course) -> tuple[Float[Tensor, "batch pos d_model"], Course]:
        """See `Network`."""
        z_h, z_l = cast(Tensor, course.state).chunk(2, dim=-1)
        if one.loop is None:
            return z_h, course
        if one.stack == SLOW:
            return self._enter(SLOW, z_h, z_l, one.loop), course
        if one.coordinates[1] == 0:
            z_h = self.loop_hooks[SLOW].hook_state_pre(z_h, one.coordinates[0])
        z_l = self.loop_hooks[FAST].hook_state_pre(z_l, one.loop)
        x = self._enter(FAST, z_l, z_h if course.e is None else z_h + course.e, one.loop)
        return x, course._replace(state=torch.cat((z_h, z_l), dim=-1))

    def lead_out(self, one: Pass, x: Float[Tensor, "batch pos d_model"], course: Course) -> Course:
        """See `Network`."""
        if one.loop is None:
            return course._replace(state=self._end(x))
        z_h, z_l = cast(Tensor, course.state).chunk(2, dim=-1)
        left = self._leave(one.stack, x, one.loop)
        if one.stack == SLOW:
            self._show_halting(left, one.loop)
        both = (z_h, left) if one.stack == FAST else (left, z_l)
        return course._replace(state=torch.cat(both, dim=-1))

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
        return self._end(self.read_part(state))

    def _end(self, z_h: Float[Tensor, "batch pos d_model"]) -> Float[Tensor, "batch pos d_model"]:
        return self.ln_final(z_h, None, self.norm_hooks["ln_final"]) if self.cfg.final_norm else z_h

    def head_input(self, x: Float[Tensor, "*dims d_model"], closed: bool = False) -> Float[Tensor, "*dims d_model"]:
        """What the unembedding reads of a residual stream x if nothing but norms came after it; no hook sees it.

        Args:
            x: vectors of the residual stream.
            closed: whether x is a state, which the norm that closes loops has been applied to.
        """
        return self.last_norm(x) if self.cfg.final_norm or (self.cfg.norms_each_loop and not closed) else x

    def last_norm(self, x: Float[Tensor, "*dims d_model"]) -> Float[Tensor, "*dims d_model"]:
        """The norm through which the head reads, where one does; no hook sees it."""
        return self.ln_final(x)

    @property
    def exit_logit(self) -> Callable[[Float[Tensor, "*rows d_model"]], Float[Tensor, "*rows"]] | None:
        """See `Network`: no gate is trained on two states."""
        return None

    @property
    def head_gain(self) -> Float[Tensor, " d_model"] | None:
        """See `Network`."""
        return self.ln_final.gain() if self.cfg.has_final_weights else None
