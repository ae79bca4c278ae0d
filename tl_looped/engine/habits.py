"""What users of TransformerLens and transformers reach for, and the call that does it here: words of our errors."""

from __future__ import annotations

from collections.abc import Iterable

from tl_looped.engine.errors import nearest

_NO_PROCESSING = "weights are never processed here, as loops share them: leave it out"
OPTIONS = {
    "fold_ln": _NO_PROCESSING,
    "center_writing_weights": _NO_PROCESSING,
    "center_unembed": _NO_PROCESSING,
    "fold_value_biases": _NO_PROCESSING,
    "refactor_factored_attn_matrices": _NO_PROCESSING,
    "device_map": 'a model lies on one device: device="cuda:0"',
    "n_devices": 'a model lies on one device: device="cuda:0"',
    "torch_dtype": "it is called dtype",
    "trust_remote_code": "no code of a checkpoint is run: leave it out",
    "hf_model": "LoopedModel.from_model(hf_model, tokenizer) shares its weights",
    "default_prepend_bos": "every call takes prepend_bos=; without it the tokenizer's own habit holds",
    "default_padding_side": "every call takes padding_side=",
    "stop_at_layer": "stop_at_loop= returns the state that would enter a loop; "
    "model.unrolled(n_loops) counts layers in depth and takes stop_at_layer=",
    "start_at_layer": "start_at_loop= with initial_state= goes on from a state",
    "max_tokens": "it is called max_new_tokens",
    "max_length": "it is called max_new_tokens, and counts new tokens only",
    "num_steps": "it is called n_loops",
    "total_ut_steps": "it is called n_loops",
    "past_kv_cache": "generate keeps keys and values itself; a run reads its whole prompt",
}
_SUM = "model.unrolled(n_loops) has it, where the sum over layers holds"
ATTRIBUTES = {
    "input_to_embed": "model(prompts, stop_at_loop=0) is the state that enters loop 0",
    "set_use_attn_result": "attn.hook_result is there without a switch",
    "set_use_hook_mlp_in": "hook ln2.hook_normalized, or use model.unrolled(n_loops)",
    "set_use_attn_in": "hook ln1.hook_normalized, or use model.unrolled(n_loops)",
    "set_use_split_qkv_input": "edit attn.hook_q, hook_k and hook_v, or use model.unrolled(n_loops)",
    "enable_compatibility_mode": _NO_PROCESSING,
    "process_weights_": _NO_PROCESSING,
    "accumulated_bias": _SUM,
    "W_E_pos": "torch.cat([model.W_E, model.W_pos]), where there are learned positions",
    "original_model": "model.transformer is the network",
    "embed": "model.W_E is its matrix, hook_embed its output",
    "unembed": "model.W_U is its matrix; model.readout(state, prompts) reads a state out",
    "ln_final": "model.transformer.ln_final is the norm, ln_final.hook_scale its hook point",
}
CONFIG = {
    "device": "model.device is it",
    "dtype": "model.dtype is it",
    "default_prepend_bos": "every call takes prepend_bos=; without it the tokenizer's own habit holds",
    "n_layers": "cfg.n_prelude, cfg.n_core and cfg.n_coda are the layers of a looped model, "
    "model.schedule.depth is the realised depth. TransformerLens's own tools take model.unrolled(n_loops)",
    "positional_embedding_type": "cfg.rotary, cfg.learned_positions say it",
    "normalization_type": "cfg.norm and cfg.norm_placement say it",
    "use_attn_result": "attn.hook_result is there without a switch",
}


def no_argument(function: str, name: str, known: Iterable[str]) -> str:
    """That a call has no such argument, and what does it here."""
    called = "model(...)" if function == "forward" else function
    return f"{called} has no argument {name!r}{_mend(OPTIONS, name, known)}"


def no_attribute(owner: str, table: dict[str, str], name: str, known: Iterable[str]) -> str:
    """That something has no such attribute, and what does it here."""
    return f"{owner} has no {name!r}{_mend(table, name, known)}"


def _mend(table: dict[str, str], name: str, known: Iterable[str]) -> str:
    return f": {table[name]}." if name in table else f".{nearest(name, known)}"
