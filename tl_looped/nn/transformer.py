"""LoopedTransformer: the (p, k⊗T, c)[I] family in plain PyTorch, with hook points.

e = prelude(embed(tokens))
x = initial state
T times:  x = close(update(x, core(enter(x, e))))     a norm closes each loop, or none
logits = unembed(final_norm(coda(loop_norm(x))))      loop_norm here only where it closes the last loop; Parcae's map of
                                                      the state comes before it, ALBERT's transform after final_norm
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import islice
from typing import cast

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from tl_looped.engine.config import LoopedConfig
from tl_looped.engine.hooks import HookDict, HookGroup
from tl_looped.engine.network import Condition, Course, Frame, Network, matrix
from tl_looped.engine.schedule import CODA, CORE, PRELUDE, HookSite, Pass
from tl_looped.nn.block import Block
from tl_looped.nn.ends import HeadTransform, head, random_weights
from tl_looped.nn.injection import DiagonalInjection
from tl_looped.nn.norm import NORMS, LayerNorm, Norm
from tl_looped.nn.rotary import Turns
from tl_looped.nn.time import TimeEmbed, clock
from tl_looped.nn.update import UpdateGate

EXIT_EPS = 1e-5  # of the LayerNorm before an exit gate


class LoopedTransformer(Network):
    """A looped decoder-only transformer. Users hold it through `tl_looped.LoopedModel`, which checks their input.

    Args:
        cfg: what to build.
    """

    def __init__(self, cfg: LoopedConfig):
        super().__init__()
        self.cfg = cfg
        self.hook_dict = HookDict()
        self.norm_hooks: dict[str, HookGroup] = {}
        without, width = _absent(cfg), cfg.d_embed or cfg.d_model  # of the embeddings
        self.hooks = HookGroup(self.hook_dict, HookSite(""), looped=False, without=without)
        self.embed = nn.Embedding(cfg.d_vocab, width)
        if cfg.learned_positions:
            self.pos_embed = nn.Embedding(cfg.n_ctx, width)
        if cfg.n_token_types:
            self.type_embed = nn.Embedding(cfg.n_token_types, width)
        if cfg.embed_norm:
            self.ln_embed = self._norm("ln_embed", width)
        if cfg.d_embed is not None:
            self.embed_map = nn.Linear(cfg.d_embed, cfg.d_model)
        self.prelude = self._stack(PRELUDE, cfg.n_prelude, looped=False)
        if cfg.prelude_norm:
            self.ln_prelude = self._norm("ln_prelude")
        self.loop_hooks = HookGroup(self.hook_dict, HookSite(""), looped=True, without=without)
        if cfg.injection in ("concat_linear", "concat_linear_prelude_first"):
            self.injection = nn.Linear(2 * cfg.d_model, cfg.d_model, bias=False)
        if cfg.injection == "diagonal":
            self.injection = DiagonalInjection(cfg.d_model)
        if cfg.loop_time:
            self.time_embed, self.step_embed = TimeEmbed(cfg.d_model), TimeEmbed(cfg.d_model)
        self.blocks = self._stack(CORE, cfg.n_core, looped=True)
        if cfg.gate_rank is not None:
            self.update_gate = UpdateGate(cfg.d_model, cfg.gate_rank)
        if cfg.norms_each_loop:
            self._hook_norm("ln_loop", looped=True)
        if cfg.loop_norm == "own":
            self.ln_loop = self._norm("")
        if cfg.exit_gate:
            self.exit_gate = nn.Linear(cfg.d_model, 1)
        if cfg.exit_norm:
            self.exit_norm = LayerNorm(cfg.d_model, EXIT_EPS)
        if cfg.state_out:
            self.state_out = nn.Linear(cfg.d_model, cfg.d_model, bias=False)
        if cfg.norms_last_loop:
            self._hook_norm("ln_coda")
        self.coda = self._stack(CODA, cfg.n_coda, looped=False)
        self._share_layers()
        if cfg.has_final_weights:
            self.ln_final = NORMS[cfg.final_norm_kind or cfg.norm](cfg.d_model, cfg.eps)
        if cfg.final_norm:
            self._hook_norm("ln_final")
        if cfg.head_transform:
            self.head_transform = HeadTransform(cfg)
        self.unembed = head(cfg, self.embed)
        self._turns = Turns(cfg)

    def _norm(self, name: str, size: int | None = None) -> Norm:
        if name:
            self._hook_norm(name)
        return NORMS[self.cfg.norm](size or self.cfg.d_model, self.cfg.eps)

    def _hook_norm(self, name: str, looped: bool = False) -> None:
        # ln_loop and ln_coda may be the final norm's weights at other sites, with hook points of their own.
        self.norm_hooks[name] = HookGroup(self.hook_dict, HookSite(f"{name}."), looped)

    def _stack(self, name: str, n_layers: int, looped: bool) -> nn.ModuleList:
        sites = (HookSite("", name, layer) for layer in range(n_layers))
        return nn.ModuleList(Block(self.cfg, self.hook_dict, site, looped) for site in sites)

    def _share_layers(self) -> None:
        """Make layers that are another's once more just that."""
        again = [(one, layer - 1) for layer, one in enumerate(self.blocks) if layer % self.cfg.layer_repeats]
        again += list(zip(self.coda, range(len(self.coda)), strict=True)) if self.cfg.coda_is_core else []
        for block, layer in again:
            cast(Block, block).share(cast(Block, self.blocks[layer]))

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
        full, windowed = self._turns.angles(positions, self.embed.weight.dtype)
        read = tokens if self.cfg.reads_tokens_in_layers else None
        times = None if step_sizes is None else clock(step_sizes, self.embed.weight.dtype, positions.device)
        return Frame(positions, full, windowed, visible, tokens=read, clock=times)

    def read(self, tokens: Int[Tensor, "batch pos"], frame: Frame) -> Float[Tensor, "batch pos d_model"]:
        """e: the embedded tokens after the prelude."""
        x = self._embedded(tokens, frame)
        for block in self.prelude:
            x = block(x, frame)
        return self._leave_prelude(x)

    def _embedded(self, tokens: Int[Tensor, "batch pos"], frame: Frame) -> Float[Tensor, "batch pos d_model"]:
        x = self.embed(tokens)
        if self.cfg.embed_scale != 1.0:
            x = x * self.cfg.embed_scale
        x = self.hooks.hook_embed(x)
        if self.cfg.learned_positions:
            x = x + self.hooks.hook_pos_embed(self.pos_embed(frame.positions.expand(len(x), -1)))
        if self.cfg.n_token_types:
            x = x + self.type_embed.weight[0]
        if self.cfg.embed_norm:
            x = self.ln_embed(x, None, self.norm_hooks["ln_embed"])
        if self.cfg.d_embed is not None:
            x = self.embed_map(x)
        return x

    def _leave_prelude(self, x: Float[Tensor, "batch pos d_model"]) -> Float[Tensor, "batch pos d_model"]:
        return self.ln_prelude(x, None, self.norm_hooks["ln_prelude"]) if self.cfg.prelude_norm else x

    def enter(
        self, state: Float[Tensor, "batch pos d_model"], e: Float[Tensor, "batch pos d_model"] | None, t: int
    ) -> Float[Tensor, "batch pos d_model"]:
        """What the first core layer reads in loop t: the state, mixed with the prelude's output as the config says."""
        x = self.loop_hooks.hook_state_pre(state, t)
        if self.cfg.reads_input_in_loops and e is not None:
            e = self.loop_hooks.hook_injection_in(e, t)
            if self.cfg.injection == "add":
                x = x + e
            elif self.cfg.injection == "diagonal":
                x = cast(DiagonalInjection, self.injection)(x, e, t, self.loop_hooks)
            elif self.cfg.injection == "concat_linear":
                x = self.injection(torch.cat((x, e), dim=-1))
            else:
                x = self.injection(torch.cat((e, x), dim=-1))
        return self.loop_hooks.hook_injection(x, t)

    def update(
        self, before: Float[Tensor, "batch pos d_model"], x: Float[Tensor, "batch pos d_model"], t: int
    ) -> Float[Tensor, "batch pos d_model"]:
        """The state that `before` becomes when the core has made x of it; before any norm."""
        x = self.loop_hooks.hook_core_out(x, t)
        if self.cfg.loop_update == "residual":
            return before + x
        if self.cfg.loop_update == "gated":
            gate = self.loop_hooks.hook_update_gate(self.update_gate(x - before), t)
            return gate * x + (1 - gate) * before
        return before + self.cfg.loop_step * (x - before)

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
        if first_layer and not self.cfg.resumes_in_loop:
            raise ValueError(f"a {self.cfg.loop_update} update needs the state that entered the loop")
        x = self.enter(state, e, t) if first_layer == 0 else state
        return self._leave(state, self.run_layers(x, frame, t, first_layer), frame, t)

    def _leave(
        self,
        state: Float[Tensor, "batch pos d_model"] | None,
        x: Float[Tensor, "batch pos d_model"],
        frame: Frame,
        t: int,
    ) -> Float[Tensor, "batch pos d_model"]:
        """The state leaving loop t, from the one that entered it (None where it is not read) and the core's x."""
        if self.cfg.loop_update != "replace":
            x = self.update(cast(Tensor, state), x, t)
        if self.cfg.norms_each_loop:
            x = self.close(x, t, self.norm_hooks["ln_loop"])
        x = self.loop_hooks.hook_state_post(x, t)
        if self.cfg.exit_gate and (frame.gates is not None or self.loop_hooks.hook_exit_gate.wants(t)):
            gate = self.loop_hooks.hook_exit_gate(self._exit_logit(x), t)
            if frame.gates is not None:
                frame.gates[t] = gate
        return x

    def run_layers(
        self, x: Float[Tensor, "batch pos d_model"], frame: Frame, t: int, first: int = 0, stop: int | None = None
    ) -> Float[Tensor, "batch pos d_model"]:
        """Core layers first, ..., stop - 1 (None: all) in loop t, from what the first of them reads."""
        if self.cfg.loop_time:
            frame = frame._replace(condition=self.condition(x, frame, t))
        for block in islice(self.blocks, first, stop):  # a slice would be a new ModuleList
            x = block(x, frame, t)
        return x

    def condition(self, x: Float[Tensor, "batch pos d_model"], frame: Frame, t: int) -> Condition:
        """What tells the layers the time of loop t."""
        if frame.clock is None:
            raise ValueError("unreachable: a run of a model whose loops have a time has step_sizes")
        begins, step = frame.clock[t]
        found, hook = self.time_embed(begins) + self.step_embed(step), self.loop_hooks.hook_condition
        return Condition(found, *hook.fire(found.expand_as(x), t)) if hook.wants(t) else Condition(found)

    def close(
        self, x: Float[Tensor, "*dims d_model"], t: int | None = None, hooks: HookGroup | None = None
    ) -> Float[Tensor, "*dims d_model"]:
        """The norm that closes every loop, where one does; x itself elsewhere. Without `hooks` none sees it."""
        if not self.cfg.norms_each_loop:
            return x
        return (self.ln_loop if self.cfg.loop_norm == "own" else self.ln_final)(x, t, hooks)

    def finish(self, state: Float[Tensor, "batch pos d_model"], frame: Frame) -> Float[Tensor, "batch pos d_read"]:
        """What the unembedding reads if the model stops with this state: after the coda and the final norm."""
        x = self._enter_coda(state)
        for block in self.coda:
            x = block(x, frame)
        return self._leave_coda(x)

    def _enter_coda(self, x: Float[Tensor, "batch pos d_model"]) -> Float[Tensor, "batch pos d_model"]:
        if self.cfg.state_out:
            x = self.hooks.hook_state_out(self.state_out(x))
        return self.ln_final(x, None, self.norm_hooks["ln_coda"]) if self.cfg.norms_last_loop else x

    def _leave_coda(self, x: Float[Tensor, "batch pos d_model"]) -> Float[Tensor, "batch pos d_read"]:
        if self.cfg.final_norm:
            x = self.ln_final(x, None, self.norm_hooks["ln_final"])
        return self.hooks.hook_head_in(self.head_transform(x)) if self.cfg.head_transform else x

    def head_input(self, x: Float[Tensor, "*dims d_model"], closed: bool = False) -> Float[Tensor, "*dims d_read"]:
        """What the unembedding reads of a residual stream x if no layers came after it; no hook sees it.

        Args:
            x: vectors of the residual stream.
            closed: whether x is a state, which the norm that closes loops has been applied to.
        """
        if self.cfg.state_out:
            x = self.state_out(x)
        if self.cfg.final_norm or self.cfg.norms_last_loop or (self.cfg.norms_each_loop and not closed):
            x = self.last_norm(x)
        return self.head_transform(x) if self.cfg.head_transform else x

    def last_norm(self, x: Float[Tensor, "*dims d_model"]) -> Float[Tensor, "*dims d_model"]:
        """The norm through which the head reads, where one does; no hook sees it."""
        return self.ln_final(x) if self.cfg.has_final_weights else self.ln_loop(x)

    @property
    def exit_logit(self) -> Callable[[Float[Tensor, "*rows d_model"]], Float[Tensor, "*rows"]] | None:
        """See `Network`."""
        return self._exit_logit if self.cfg.exit_gate else None

    def _exit_logit(self, state: Float[Tensor, "*rows d_model"]) -> Float[Tensor, "*rows"]:
        return self.exit_gate(self.exit_norm(state) if self.cfg.exit_norm else state).squeeze(-1)

    @property
    def head_gain(self) -> Float[Tensor, " d_model"] | None:
        """What multiplies every component of the residual stream just before the head; None where nothing does."""
        if self.cfg.final_norm or self.cfg.loop_norm == "each":
            return self.ln_final.gain()
        return self.ln_loop.gain() if self.cfg.loop_norm == "own" else None

    @property
    def after_loops(self) -> Float[Tensor, "d_model d_model"] | None:
        """The linear map of the state before what comes after the loops; None where there is none."""
        return matrix(self.state_out, "state_out") if self.cfg.state_out else None

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

    def lead_in(self, one: Pass, course: Course) -> tuple[Float[Tensor, "batch pos d_model"], Course]:
        """See `Network`."""
        if one.stack == PRELUDE:
            return self._embedded(course.tokens, course.frame), course
        state = cast(Tensor, course.state)
        return (self._enter_coda(state) if one.loop is None else self.enter(state, course.e, one.loop)), course

    def layers_of(
        self, one: Pass, x: Float[Tensor, "batch pos d_model"], frame: Frame, layers: range
    ) -> Float[Tensor, "batch pos d_model"]:
        """See `Network`."""
        if one.loop is None:
            return super().layers_of(one, x, frame, layers)
        return self.run_layers(x, frame, one.loop, layers.start, layers.stop)

    def lead_out(self, one: Pass, x: Float[Tensor, "batch pos d_model"], course: Course) -> Course:
        """See `Network`."""
        if one.stack == PRELUDE:
            e = self._leave_prelude(x)
            return course._replace(state=self.hooks.hook_state_init(e if course.state is None else course.state), e=e)
        left = self._leave_coda(x) if one.loop is None else self._leave(course.state, x, course.frame, one.loop)
        return course._replace(state=left)


def _absent(cfg: LoopedConfig) -> list[str]:
    """The sites of the model and of its loops that it does not have."""
    has = {
        "hook_pos_embed": cfg.learned_positions,
        "hook_injection_in": cfg.reads_input_in_loops,
        "hook_injection_decay": cfg.injection == "diagonal",
        "hook_injection_step": cfg.injection == "diagonal",
        "hook_condition": cfg.loop_time,
        "hook_core_out": cfg.loop_update != "replace",
        "hook_update_gate": cfg.loop_update == "gated",
        "hook_exit_gate": cfg.exit_gate,
        "hook_halt_gate": False,
        "hook_state_out": cfg.state_out,
        "hook_head_in": cfg.head_transform,
    }
    return [name for name, is_so in has.items() if not is_so]
