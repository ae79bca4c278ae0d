"""HRM (arXiv 2506.21734) and TRM (arXiv 2510.04871): solvers of puzzles, with two states and no causal mask.

Their config.json is the `all_config.yaml` of a training run as JSON, with the data set's `dataset.json` under
"dataset". An outer step of the published code is `H_cycles` loops here: it carries both states on. An evaluation always
runs `halt_max_steps` of them, which are halt_max_steps · H_cycles loops.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from tl_looped.adapters.base import ConfigKeys, Json, Source
from tl_looped.engine.config import LoopedConfig
from tl_looped.engine.errors import LoadError
from tl_looped.engine.parts import Puzzles, Rotary, TwoStates
from tl_looped.engine.schedule import FAST, SLOW

_STACKS = {FAST: "L_level", SLOW: "H_level"}
# Of training, and of evaluation beside the model.
_TRAINING = ("global_batch_size", "epochs", "lr", "lr_min_ratio", "lr_warmup_steps", "weight_decay", "beta1", "beta2")
_TRAINING += ("puzzle_emb_lr", "puzzle_emb_weight_decay", "project_name", "run_name", "checkpoint_path", "seed")
_TRAINING += ("checkpoint_every_eval", "eval_interval", "eval_save_outputs", "load_checkpoint", "evaluators")
_TRAINING += ("min_eval_interval", "ema", "ema_rate", "freeze_weights", "data_path", "data_paths", "data_paths_test")
_OF_MODEL = ("loss", "halt_exploration_prob", "forward_dtype", "no_ACT_continue")


class HrmAdapter:
    """Post-norm layers; z_H and z_L start as stored vectors, and the embedding is added in every pass of L."""

    family = "hrm"
    feedforward = False
    name = "HierarchicalReasoningModel_ACTV1"
    one_net = False

    def claims(self, config: Json) -> bool:
        """Whether a config.json is of this kind."""
        arch = config.get("arch")
        return isinstance(arch, dict) and str(arch.get("name", "")).endswith(self.name)

    def config(self, config: ConfigKeys, names: frozenset[str], model_name: str) -> LoopedConfig:
        """Our config from theirs."""
        arch, data = config.section("arch"), config.section("dataset")
        config.harmless(*_TRAINING)
        arch.harmless("name", *_OF_MODEL)
        data.harmless("pad_id", "ignore_label_id", "blank_identifier_id", "total_groups", "mean_puzzle_examples")
        data.harmless("sets", "total_puzzles", "num_puzzles")
        arch.only(pos_encodings={"rope", "none"} if self.one_net else "rope", mlp_t=False)
        d, n_heads, layers = arch.count("hidden_size"), arch.count("num_heads"), arch.count("L_layers")
        of_h = arch.get("H_layers", layers)
        if not self.one_net and of_h != layers:
            raise LoadError(f"config.json has arch.H_layers={of_h} and arch.L_layers={layers}: only equal ones are.")
        numbers = arch.get("puzzle_emb_ndim", 0)
        rows = (arch.get("puzzle_emb_len", 0) if self.one_net else 0) or -(-numbers // d)
        h_cycles, rope = arch.count("H_cycles"), arch.get("pos_encodings", "rope") == "rope"
        return LoopedConfig(
            d_model=d,
            n_heads=n_heads,
            d_head=d // n_heads,
            d_mlp=-(-round(arch.need("expansion") * d * 2 / 3) // 256) * 256,
            d_vocab=data.count("vocab_size"),
            n_ctx=data.count("seq_len") + rows,
            n_core=layers,
            n_loops=arch.count("halt_max_steps") * h_cycles,
            two_states=TwoStates(arch.count("L_cycles"), h_start="vector", one_net=self.one_net),
            norm_placement="post",
            norm="weightless",
            eps=arch.get("rms_norm_eps", 1e-5),
            causal=False,
            rotary=Rotary(arch.get("rope_theta", 10000.0)) if rope else None,
            injection="add",
            halt_gate=True,
            embed_scale=d**0.5,
            puzzles=Puzzles(data.count("num_puzzle_identifiers"), rows, numbers) if numbers else None,
            final_norm=False,
            model_name=model_name,
            family=self.family,
        )

    def sources(self, cfg: LoopedConfig) -> dict[str, Source]:
        """Where each of our parameters comes from."""
        inner = "model.inner."
        sources = {
            "embed.weight": Source(f"{inner}embed_tokens.embedding_weight"),
            "state_init": Source(f"{inner}L_init"),
            "h_init": Source(f"{inner}H_init"),
            "unembed.weight": Source(f"{inner}lm_head.weight"),
            "halt_gate.weight": Source(f"{inner}q_head.weight"),
            "halt_gate.bias": Source(f"{inner}q_head.bias"),
        }
        if cfg.puzzles is not None:
            sources["puzzles.weight"] = Source(f"{inner}puzzle_emb.weights")
        d, wide = cfg.d_model, cfg.d_mlp
        for stack in (FAST,) if self.one_net else (FAST, SLOW):
            for layer in range(cfg.n_core):
                ours, theirs = f"{stack}.{layer}", f"{inner}{_STACKS[stack]}.layers.{layer}"
                for i, name in enumerate("qkv"):
                    fused = (f"{theirs}.self_attn.qkv_proj.weight", i * d, (i + 1) * d, (3 * d, d))
                    sources[f"{ours}.attn.{name}.weight"] = Source(*fused)
                for i, name in enumerate(("gate", "up")):
                    fused = (f"{theirs}.mlp.gate_up_proj.weight", i * wide, (i + 1) * wide, (2 * wide, d))
                    sources[f"{ours}.mlp.{name}.weight"] = Source(*fused)
                sources[f"{ours}.attn.o.weight"] = Source(f"{theirs}.self_attn.o_proj.weight")
                sources[f"{ours}.mlp.down.weight"] = Source(f"{theirs}.mlp.down_proj.weight")
        return sources

    def checked(self, cfg: LoopedConfig) -> dict[str, Callable[[Tensor], None]]:
        """Nothing beside the parameters is stored."""
        return {}


class TrmAdapter(HrmAdapter):
    """The same with one net in both roles."""

    family = "trm"
    name = "TinyRecursiveReasoningModel_ACTV1"
    one_net = True
