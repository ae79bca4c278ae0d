"""What the realised-depth view has to know of a model. No other file of this room asks the config for a choice."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor
from transformer_lens.config import TransformerBridgeConfig

from tl_looped.engine.config import LoopedConfig
from tl_looped.engine.errors import InputError
from tl_looped.engine.parts import QKNorm, Rotary
from tl_looped.engine.schedule import CORE, HookSite, LoopSchedule
from tl_looped.nn.rotary import component_frequencies, rotary_angles


@dataclass(frozen=True)
class Architecture:
    """A looped model with its loops counted out.

    Args:
        cfg: the model's config.
        n_loops: loops to unroll.
    """

    cfg: LoopedConfig
    n_loops: int

    @cached_property
    def schedule(self) -> LoopSchedule:
        """Which layer runs at which depth."""
        return self.cfg.schedule(self.n_loops)

    # Parts.

    def check_parts(self) -> None:
        """Raise for a model with a part that the view does not build.

        Raises:
            InputError: the message names the part.
        """
        cfg, plain = self.cfg, Rotary(self.rotary.base, self.rotary.style, scaling=self.rotary.scaling)
        unknown = {
            "two stacks that loop": cfg.one_core_broken_by(),
            "a gate on attention": cfg.attn_gate,
            "norms on the stream alone": cfg.norm_placement == "post",
            "norms other than root-mean-square norms with weights": {cfg.norm, cfg.final_norm_kind} - {"rms", None},
            "an MLP other than silu(gate) · up": cfg.act_fn != "silu" or not cfg.gated_mlp,
            "biases other than those of queries and keys": cfg.v_bias or cfg.o_bias or cfg.mlp_bias,
            "a norm on queries and keys of another kind": cfg.qk_norm not in (None, QKNorm()),
            "a scale of the scores": cfg.attn_scale not in (None, cfg.d_head**-0.5) or cfg.scores_by_layer,
            "soft caps": cfg.score_cap or cfg.logit_cap,
            "sliding windows": any(cfg.windows),
            "another position embedding": cfg.learned_positions or cfg.rotary != plain or cfg.rotary_windowed,
            "an injection of another kind": cfg.injection not in ("none", "add", "concat_linear"),
            "an update of the state that keeps a part of it": cfg.loop_update != "replace",
            "a linear map after the loops": cfg.state_out,
            "layers that the loop's time modulates": cfg.loop_time,
            "attention in both directions": not cfg.causal,
            "norms on the stream without one before": cfg.norm_placement == "post",
            "an embedding or a head of another form": cfg.d_embed or cfg.n_token_types or cfg.head_transform,
            "value embeddings": any(cfg.value_embeds),
            "an exit gate that reads a norm of its own": cfg.exit_norm,
            "norms at the prelude or of the loop's own": cfg.embed_norm or cfg.prelude_norm or cfg.loop_norm == "own",
        }
        found = [part for part, is_so in unknown.items() if is_so]
        if found:
            raise InputError(
                f"the realised-depth view does not build {found[0]}, which {cfg.model_name!r} has: use the model's own "
                "calls (run_with_cache, tl_looped.patching, tl_looped.lens), which need no view."
            )

    @property
    def rotary(self) -> Rotary:
        """How positions turn queries and keys."""
        return self.cfg.rotary or Rotary()

    @property
    def act(self) -> Callable[[Tensor], Tensor]:
        """What the gate of an MLP goes through."""
        return F.silu

    @property
    def norms_stream(self) -> bool:
        """Whether ln1_post and ln2_post norm the residual stream, and not what is added to it."""
        return self.cfg.norm_placement == "residual_sandwich"

    @property
    def injects(self) -> bool:
        """Whether every loop mixes the prelude's output into the state, by a map of both or a sum."""
        return self.cfg.reads_input_in_loops

    @property
    def closing(self) -> HookSite | None:
        """The norm after the last loop, where it is the view's ln_final: nothing but the head comes after it."""
        if self.cfg.final_norm or self.cfg.n_coda:
            return None
        return self.cfg.head_norm_site(self.n_loops - 1)

    def closes(self, loop: int) -> bool:
        """Whether a norm that is not ln_final closes a loop."""
        return self.cfg.norms_each_loop and (loop < self.n_loops - 1 or self.closing is None)

    @property
    def norms_before_coda(self) -> bool:
        """Whether a norm that is not ln_final comes between the last loop and what follows."""
        return self.cfg.norms_last_loop and self.closing is None

    @property
    def head_norm(self) -> str | None:
        """The norm before the head: ln_final, a name that tells TransformerLens that nothing else is on the way."""
        if self.cfg.readout_broken_by() is None:
            return "ln_final"
        return "ln_head" if self.cfg.final_norm else None

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

    def folding_broken_by(self) -> str | None:
        """Why the norm before the head can't be folded into the head."""
        gated = self.cfg.exit_gate and self.closing is not None
        return "its exit gate reads the norm before the head too, so it is not folded in" if gated else None

    def first_start(self) -> int:
        """The first depth from which the rest of a run reads nothing but the residual stream there."""
        return self.schedule.realised_depth(CORE, 0, self.n_loops - 1) if self.injects else 0

    # In TransformerLens's terms.

    def bridge_config(self, device: torch.device, dtype: torch.dtype) -> TransformerBridgeConfig:
        """Sizes and kinds, as TransformerLens's tools ask for them."""
        cfg = self.cfg
        return TransformerBridgeConfig(
            **{name: getattr(cfg, name) for name in _SIZES},
            n_layers=self.schedule.depth,
            n_key_value_heads=cfg.kv_heads if cfg.kv_heads != cfg.n_heads else None,
            device=str(device),
            dtype=dtype,
            architecture="LoopedUnrolled",
            gated_mlp=True,
            rotary_base=self.rotary.base,
            normalization_type="RMS",
            final_rms=True,
            uses_rms_norm=True,
            positional_embedding_type="rotary",
            rotary_interleaved_cos_sin=self.rotary.style == "adjacent",
            tie_word_embeddings=cfg.tie_embeddings,
        )

    def frequencies(self) -> Float[Tensor, " d_head"]:
        """Radians per position of each component of a head, as TransformerLens turns them: all forward."""
        return component_frequencies(self.rotary, self.cfg.d_head).abs()

    def angles(
        self, frequencies: Float[Tensor, " d_head"], positions: Int[Tensor, "rows pos"], dtype: torch.dtype
    ) -> tuple[Float[Tensor, "rows pos d_head"], Float[Tensor, "rows pos d_head"]]:
        """Cosine and sine of rotary embedding."""
        cos, sin = rotary_angles(self.rotary, frequencies, positions, dtype)
        return cos.squeeze(2), sin.squeeze(2)


_SIZES = ("d_model", "d_head", "n_ctx", "n_heads", "d_mlp", "d_vocab", "model_name", "act_fn", "eps")
