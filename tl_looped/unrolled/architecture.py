"""What the realised-depth view has to know of a model. No other file of this room asks the config for a choice."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from transformer_lens.config import TransformerBridgeConfig

from tl_looped.engine.config import LoopedConfig
from tl_looped.engine.ends import resolve_steps
from tl_looped.engine.schedule import CODA, CORE, PRELUDE, HookSite, LoopCount, LoopSchedule


@dataclass(frozen=True)
class Architecture:
    """A looped model with its loops counted out.

    Args:
        cfg: the model's config.
        counts: loops to unroll; with two stacks that loop, also how often the fast one runs in each.
    """

    cfg: LoopedConfig
    counts: LoopCount

    @cached_property
    def schedule(self) -> LoopSchedule:
        """Which layer runs at which depth."""
        return self.cfg.schedule(self.counts)

    @property
    def n_loops(self) -> int:
        """Loops of a run."""
        return self.cfg.counts(self.counts)[0]

    @property
    def l_cycles(self) -> int | None:
        """Of two stacks that loop, how often the fast one runs in each loop."""
        return self.cfg.counts(self.counts)[1]

    @property
    def steps(self) -> tuple[float, ...] | None:
        """The step sizes of loops that have a time."""
        return resolve_steps(self.cfg, None, self.n_loops)

    # What there is beside the layers.

    @property
    def stacks(self) -> tuple[str, ...]:
        """The network's stacks of layers, by the names that it has for them."""
        return (PRELUDE, CORE, CODA) if self.cfg.two_states is None else self.cfg.looping

    @cached_property
    def loops(self) -> dict[str, str | None]:
        """Where every loop has its own sites -> its stack, None where one stack loops."""
        if self.cfg.two_states is None:
            return {f"loop.{t}": None for t in range(self.n_loops)}
        each = [(name, t) for name in self.cfg.looping for t in range(self.schedule.n_loops(name))]
        return {f"{self.short(name)}.loop.{t}": name for name, t in each}

    @staticmethod
    def short(stack: str) -> str:
        """A stack in the names of what its loops have: TransformerLens takes L_blocks for more lists of layers."""
        return stack.removesuffix("_blocks")

    @property
    def _embeds_apart(self) -> bool:
        """Whether what is embedded is made of more than a row of the embedding."""
        return self.cfg.puzzles is not None

    @property
    def embed_scale(self) -> float:
        """What the embedding itself is multiplied by; TransformerLens's hook_embed is behind that."""
        return 1.0 if self._embeds_apart else self.cfg.embed_scale

    @property
    def unscaled(self) -> LoopedConfig:
        """The config of a network whose embedding does that already."""
        return self.cfg if self._embeds_apart else dataclasses.replace(self.cfg, embed_scale=1.0)

    @property
    def fired(self) -> tuple[str, ...]:
        """Sites of the model that are the output of one of its modules, where TransformerLens's component fires."""
        return ("hook_pos_embed", "hook_state_out", *([] if self._embeds_apart else ["hook_embed"]))

    def component(self, site: str) -> str:
        """What the component of another such site is called."""
        return "embedded" if site == "embed" else site

    @property
    def points(self) -> dict[str, str]:
        """The model's own sites -> the hook points that have them."""
        names = ["state_init", "state_out", "head_in", *(["embed"] if self._embeds_apart else [])]
        return {f"hook_{name}": f"{self.component(name)}.hook_out" for name in names}

    @property
    def norms_stream(self) -> bool:
        """Whether ln1_post and ln2_post norm the residual stream, and not what is added to it."""
        return self.cfg.norm_placement in ("residual_sandwich", "post")

    @property
    def closing(self) -> HookSite | None:
        """The norm after the last loop, where it is the view's ln_final: nothing but the head comes after it."""
        if self.cfg.final_norm or self.cfg.n_coda:
            return None
        return self.cfg.head_norm_site(self.n_loops - 1)

    @property
    def head_norm(self) -> str | None:
        """The norm before the head: ln_final, a name that tells TransformerLens that nothing else is on the way."""
        if self.cfg.readout_broken_by() is None:
            return "ln_final"
        return "ln_head" if self.cfg.final_norm else None

    @cached_property
    def norm_calls(self) -> dict[str, list[str]]:
        """The network's own word for a norm -> where the view has it: once, or in every loop."""
        cfg, last = self.cfg, self.n_loops - 1
        found: dict[str, list[str]] = {}
        if cfg.norms_each_loop:
            for path, stack in self.loops.items():
                found.setdefault(stack or "ln_loop", []).append(f"{path}.ln_loop")
            if self.closing is not None:
                found[cfg.head_stack or "ln_loop"][last] = "ln_final"
        if cfg.norms_last_loop:
            found["ln_coda"] = ["ln_coda" if self.closing is None else "ln_final"]
        if cfg.final_norm and self.head_norm is not None:
            found["ln_final"] = [self.head_norm]
        return found

    @cached_property
    def norms(self) -> dict[str, str]:
        """Where the view has a norm -> the network's module for it, which may serve several places."""
        own = self.cfg.loop_norm == "own"
        paths = {path: own and name == "ln_loop" for name, paths in self.norm_calls.items() for path in paths}
        return {path: "ln_loop" if is_own else "ln_final" for path, is_own in paths.items()}

    # Why a tool of TransformerLens is not right here; None where it is.

    def sum_broken_by(self) -> str | None:
        """Why the last state is not the embedding plus the layers' outputs."""
        return self.cfg.sum_broken_by(self.n_loops)

    def heads_mixed_by(self) -> str | None:
        """Why what a layer adds is not the sum of what its heads and neurons write."""
        return self.cfg.heads_mixed_by()

    def readout_broken_by(self) -> str | None:
        """Why the head does not read the last layer's output through one norm and nothing else."""
        return self.cfg.readout_broken_by()

    def capped_by(self) -> str | None:
        """Why logits are not linear in what the head reads."""
        return None if self.cfg.logit_cap is None else "a soft cap comes between its head and its logits"

    def split_broken_by(self) -> str | None:
        """Why what queries, keys and values read can't be taken apart."""
        if self.cfg.loop_time:
            return "the loop's time scales what attention reads"
        if self.cfg.attn_gate or any(self.cfg.value_embeds):
            return "a gate in attention reads what queries, keys and values read"
        return None

    def folding_broken_by(self) -> str | None:
        """Why norms can't be folded into what reads them."""
        cfg = self.cfg
        if cfg.exit_gate and self.closing is not None:
            return "its exit gate reads the norm before the head too, so it is not folded in"
        if cfg.norm != "weightless" and self.split_broken_by() is not None:
            return f"{self.split_broken_by()}, with the norm's weights in it"
        if cfg.final_norm_kind not in (None, cfg.norm):
            return "its last norm is of another kind than those of its layers"
        return None

    def centring_broken_by(self) -> str | None:
        """Why the mean of what is written can't be left out, as TransformerLens leaves it out before LayerNorms."""
        cfg = self.cfg
        if cfg.norm not in ("layer", "layer_no_bias"):
            return None
        others = cfg.exit_gate or cfg.state_out or cfg.d_embed or cfg.loop_update == "gated" or cfg.loop_time
        plain = cfg.norm_placement in ("pre", "output_sandwich") and self.readout_broken_by() is None
        if others or not plain or cfg.injection not in ("none", "add"):
            return "more than LayerNorms reads its residual stream"
        return None

    def first_start(self) -> int:
        """The first depth from which the rest of a run reads nothing but the residual stream there; else the depth."""
        cfg, schedule, last = self.cfg, self.schedule, self.n_loops - 1
        if cfg.reads_tokens_in_layers or cfg.d_embed is not None:
            return schedule.depth
        if cfg.two_states is not None:
            return schedule.realised_depth(cfg.looping[-1], 0, last)
        if cfg.loop_update != "replace":
            return schedule.realised_depth(CODA, 0, None) if cfg.n_coda else schedule.depth
        return schedule.realised_depth(CORE, 0, last) if cfg.reads_input_in_loops else 0

    # In TransformerLens's terms.

    def bridge_config(self, device: torch.device, dtype: torch.dtype) -> TransformerBridgeConfig:
        """Sizes and kinds, as TransformerLens's tools ask for them."""
        cfg, rms = self.cfg, self.cfg.norm not in ("layer", "layer_no_bias")
        rotary = cfg.rotary or cfg.rotary_windowed
        more: dict[str, Any] = {name: getattr(cfg, name) for name in _SIZES}
        if rotary is not None:
            more |= {"rotary_base": rotary.base, "rotary_interleaved_cos_sin": rotary.style == "adjacent"}
        if cfg.logit_cap is not None:
            more["output_logits_soft_cap"] = cfg.logit_cap
        return TransformerBridgeConfig(
            **more,
            n_layers=self.schedule.depth,
            n_key_value_heads=cfg.kv_heads if cfg.kv_heads != cfg.n_heads else None,
            device=str(device),
            dtype=dtype,
            architecture="LoopedUnrolled",
            act_fn={"gelu_tanh": "gelu_new"}.get(cfg.act_fn, cfg.act_fn),
            gated_mlp=cfg.gated_mlp,
            normalization_type="RMS" if rms else "LN",
            final_rms=rms,
            uses_rms_norm=rms,
            rmsnorm_uses_offset=cfg.norm == "rms_plus_one",
            positional_embedding_type="standard" if rotary is None else "rotary",
            attention_dir="causal" if cfg.causal else "bidirectional",
            tie_word_embeddings=cfg.tie_embeddings,
        )


_SIZES = ("d_model", "d_head", "n_ctx", "n_heads", "d_mlp", "d_vocab", "model_name", "eps")
