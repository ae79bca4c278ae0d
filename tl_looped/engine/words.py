"""A config in the words of a report: the choices that make up a model."""

from __future__ import annotations

from tl_looped.engine.config import LoopedConfig
from tl_looped.engine.parts import (
    ACT_FNS,
    INJECTIONS,
    LOOP_NORMS,
    LOOP_TIME,
    LOOP_UPDATES,
    NORM_KINDS,
    NORM_PLACEMENTS,
)


def describe(cfg: LoopedConfig) -> list[tuple[str, str]]:
    """The choices that make up the model, each as (name, what it is); what a model does not have is left out."""
    formula, words = INJECTIONS[cfg.injection]
    act = ACT_FNS[cfg.act_fn]
    mixed = words if cfg.injection == "none" else f"{formula}: {words.format(source=cfg.source)}"
    mlp = f"{act}(gate) · up" if cfg.gated_mlp else f"{act}, not gated"
    read = ", through a LayerNorm" if cfg.exit_norm else ""
    biases = {"queries and keys": cfg.qk_bias, "values": cfg.v_bias, "attention's output": cfg.o_bias}
    biased = [name for name, is_so in {**biases, "the MLP": cfg.mlp_bias}.items() if is_so]
    parts = {
        "norm placement": NORM_PLACEMENTS[cfg.norm_placement],
        "norm": NORM_KINDS[cfg.norm],
        "MLP": mlp,
        "biases": ", ".join(biased),
        "attention": "; ".join(_attention_in_words(cfg)),
        "injection": mixed if cfg.two_states is None else "",
        "states": "" if cfg.two_states is None else cfg.two_states.in_words(cfg.reads_input_in_loops),
        "initial state": cfg.state_in_words(),
        "time of the loop": LOOP_TIME if cfg.loop_time else "",
        "update of the state": LOOP_UPDATES[cfg.loop_update][0].format(step=cfg.loop_step)
        if cfg.loop_update != "replace"
        else "",
        "before the coda": "a linear map of the state, C x" if cfg.state_out else "",
        "layers": f"each {cfg.layer_repeats} times in a row" if cfg.layer_repeats > 1 else "",
        "coda": "the core's layers once more, outside of the loops" if cfg.coda_is_core else "",
        "norm of the loop": LOOP_NORMS[cfg.loop_norm],
        "norm before the prelude": "yes" if cfg.embed_norm else "",
        "norm after the prelude": "yes" if cfg.prelude_norm else "",
        "norm before the head": "yes" if cfg.final_norm else "no",
        "position": _position_in_words(cfg),
        "head": "W N(act(W′ x + b′)) + b, with act that of the MLP" if cfg.head_transform else "",
        "embedding": "" if cfg.d_embed is None else f"{cfg.d_embed} wide, then a linear map to {cfg.d_model}",
        "logits": "" if cfg.logit_cap is None else f"soft cap of {cfg.logit_cap:g}",
        "exit gate": f"a linear gate on the state after every loop{read}" if cfg.exit_gate else "",
        "halting": "a linear map of z_H at position 0, to (halt, go on)" if cfg.halt_gate else "",
        "puzzles": "" if cfg.puzzles is None else f"{cfg.puzzles.n}, of {cfg.puzzles.rows} positions each",
        "prompts": _sight_in_words(cfg),
    }
    return [(name, text) for name, text in parts.items() if text]


def _sight_in_words(cfg: LoopedConfig) -> str:
    if not cfg.causal:
        return "all tokens see each other"
    return "tokens of a prefix see each other in both directions" if cfg.prefix_lm else ""


def _attention_in_words(cfg: LoopedConfig) -> list[str]:
    words: list[str] = []
    seen = sorted({window for window in cfg.windows if window is not None})
    if cfg.qk_norm is not None:
        each = {"head": "every head of q and of k", "whole": "all of q and all of k"}[cfg.qk_norm.per]
        words.append(f"a norm on {each}, {'after' if cfg.qk_norm.after_rotary else 'before'} rotary")
    if cfg.attn_gate:
        words.append("a gate on every channel of every head's output")
    if any(cfg.value_embeds):
        words.append(f"in {sum(cfg.value_embeds)} of {len(cfg.value_embeds)} layers 2σ(W y) E[token] joins values")
    if cfg.scores_by_layer:
        words.append("scores divided by the layer's number")
    if cfg.score_cap is not None:
        words.append(f"soft cap of {cfg.score_cap:g} on scores")
    if seen:
        some = sum(window is not None for window in cfg.windows)
        words.append(f"{some} of {len(cfg.windows)} layers see the last {', '.join(map(str, seen))} tokens only")
    return words


def _position_in_words(cfg: LoopedConfig) -> str:
    words = ["learned"] if cfg.learned_positions else []
    if cfg.rotary is not None:
        words.append(f"rotary, base {cfg.rotary.base:,.0f}")
    if cfg.rotary_windowed is not None:
        words.append(f"base {cfg.rotary_windowed.base:,.0f} in layers with a window")
    return ", ".join(words) or "none"
