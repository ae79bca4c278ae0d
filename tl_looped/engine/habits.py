"""What users of TransformerLens and transformers reach for, and the call that does it here: words of our errors."""

from __future__ import annotations

from collections.abc import Iterable

from tl_looped.engine.errors import nearest

_NO_PROCESSING = "weights are never processed here, as loops share them: leave it out"
_REVISION = "a checkpoint of a training run is a revision= or a subfolder="
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
    "stop_at_layer": "a layer runs in every loop, so stop_at=(loop, layer) returns the stream that enters it, and "
    "stop_at_loop= the state that enters a loop; model.unrolled(n_loops) counts layers in depth, with stop_at_layer=",
    "start_at_layer": "a layer runs in every loop, so model(stream, start_at=(loop, layer), tokens=prompts) goes on "
    "from the stream that enters it",
    "max_tokens": "it is called max_new_tokens",
    "max_length": "it is called max_new_tokens, and counts new tokens only",
    "num_steps": "it is called n_loops",
    "total_ut_steps": "it is called n_loops",
    "past_kv_cache": "generate keeps keys and values itself; a run reads its whole prompt",
    "move_to_device": "tokens come on the model's device: leave it out",
    "truncate": "text that is too long is an error: cut it first",
    "checkpoint_index": _REVISION,
    "checkpoint_value": _REVISION,
    "first_n_layers": "a run stops at a layer with stop_at=(loop, layer)",
    "return_cache_object": "cache.cache_dict is the plain dictionary",
}
_DATA = "every call takes a dataset as prompts, with field="
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
    "from_pretrained_no_processing": "LoopedModel.from_pretrained(name) processes no weights",
    "boot_transformers": "LoopedModel.from_pretrained(name) loads a checkpoint",
    **dict.fromkeys(("fold_layer_norm", "center_writing_weights", "center_unembed"), _NO_PROCESSING),
    "set_tokenizer": "model.tokenizer = tokenizer sets it",
    "set_ungroup_grouped_query_attention": "attn.hook_k and hook_v have the heads of keys and values",
    "sample_datapoint": _DATA,
    "load_sample_training_dataset": _DATA,
    "hook_embed": 'model.hook_dict["hook_embed"] is the point',
    "pos_embed": "model.W_pos is its matrix, hook_pos_embed its output, where there are learned positions",
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
    "use_split_qkv_input": "edit attn.hook_q, hook_k and hook_v",
    "use_attn_in": "hook ln1.hook_normalized",
    "use_hook_mlp_in": "hook ln2.hook_normalized",
    "ungroup_grouped_query_attention": "attn.hook_k and hook_v have the heads of keys and values",
    "attention_dir": "cfg.causal says it",
    "attn_only": "every layer has an MLP",
    "parallel_attn_mlp": "every MLP reads what attention wrote",
    "d_vocab_out": "cfg.d_vocab is it",
    "window_size": "cfg.window(stack, layer) is that of a layer",
    "rotary_dim": "cfg.rotary says it",
    "final_rms": "cfg.norm and cfg.final_norm_kind say it",
    "n_params": "model.n_params_total counts them",
    **dict.fromkeys(("tokenizer_name", "tokenizer_prepends_bos"), "model.tokenizer is the tokenizer"),
    **dict.fromkeys(("seed", "init_weights", "initializer_range"), "LoopedModel.from_config(cfg, seed=) draws weights"),
    "original_architecture": "cfg.model_name says what was loaded",
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
