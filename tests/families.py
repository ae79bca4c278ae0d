"""What test_families.py runs on: the folders of stored numbers since Ouro and Raven, and what gives each here."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any

import torch
from helpers import PARITY, expected
from torch import Tensor

from tl_looped import LoopedCache, LoopedModel
from tl_looped.engine.numbers import first_met
from tl_looped.lens import GateChanceRule, GateRule, trace_exits

FOLDERS = ("ff-llama", "ff-mistral", "ff-qwen2", "ff-qwen3", "ff-gemma2", "ff-gemma3", "ff-gpt2", "nanochat")
FOLDERS += ("nanochat-recursive", "looped-nanochat", "base-loop", "looped-gpt", "loopus-qwen3", "parcae", "loopformer")
FOLDERS += ("albert", "mobilellm-ls", "hrm-text")

# Stored key -> what gives it.
STACKED = {"resid_post": "resid_post", "pattern": "pattern", "state_post": "state_post", "injection_out": "injection"}
STACKED |= {"attn_out": "attn_out", "mlp_out": "mlp_out"}
ENDS = {"resid_post": "hook_resid_post", "pattern": "attn.hook_pattern"}
HEAD_INPUT = ("final_norm_out", "norm_f_out", "ln_f_out")
# Of a feedforward model as it is.
UNLOOPED = ("logits", "hidden_states", "layer_resid_post", "layer_pattern", "layer0_in", *HEAD_INPUT)
# What the published cache computes, in which all loops of a layer share one slot: in test_kv_slots.py.
# (And HRM-Text's gradients, which its public code cuts at the last cycles: ours are held to finite differences.)
OTHER_CACHE = ("decode", "generated_greedy", "warm_full")
GIVEN = (
    "steps.",
    "input_ids",
    "input_states",
    "loop_layers",
    "token_type_ids",
    "attention_mask",
    "with_types_and_mask",  # tokens of a second kind are refused
    "layer_order",
    "call_l",
    "once.",  # without sharing: in test_family_parts.py
    "decode.prefill_len",
    "exit.threshold",
    "exit_cdf.threshold",
    "exit_conv.epsilon",
)


def loops_for(folder: str, theirs: int) -> int:
    """How many loops here make so many of theirs; Looped-GPT counts the plain pass, which is a coda here."""
    return theirs - 1 if folder == "looped-gpt" else theirs


@lru_cache
def load(folder: str, dtype: torch.dtype = torch.float32, looped: bool = True) -> LoopedModel:
    """The folder's model; a feedforward one looped as the reference was, unless it is asked for as it is."""
    layers = expected(folder).get("loop_layers")
    options: dict[str, Any] = {}
    if layers is not None and looped:
        options = {"loop_layers": tuple(layers.tolist()), "n_loops": len(expected(folder)["resid_post"])}
    return LoopedModel.from_pretrained(PARITY / folder, dtype=dtype, **options)


@lru_cache
def ran(folder: str, looped: bool = True) -> tuple[LoopedModel, Tensor, LoopedCache]:
    """The model, its logits and everything in its cache, at the largest loop count stored."""
    model = load(folder, looped=looped)
    stored = expected(folder).get("resid_post") if looped else None
    loops = None if stored is None else loops_for(folder, len(stored))
    with torch.no_grad():
        logits, cache = model.run_with_cache(expected(folder)["input_ids"], loops, **given(folder))
    return model, logits, cache


@lru_cache
def ran_with_prefix(folder: str) -> tuple[LoopedModel, Tensor, LoopedCache]:
    """The same with the stored prefixes, whose tokens see each other in both directions."""
    model, stored = load(folder), expected(folder)
    with torch.no_grad():
        logits, cache = model.run_with_cache(stored["input_ids"], token_type_ids=stored["token_type_ids"])
    return model, logits, cache


def of_two_stacks(folder: str, key: str) -> Tensor:
    """What a model of two stacks computes for a stored key: "causal." or "prefix.", and "L_" or "H_" for the stack."""
    how, _, key = key.partition(".")
    model, logits, cache = {"causal": ran, "prefix": ran_with_prefix, "prefix_all": ran}[how](folder)
    if key == "logits":
        return logits
    if key == "generated":
        length = expected(folder)["input_ids"].shape[1]
        new = expected(folder)["prefix_all.generated"].shape[1] - length
        options: dict[str, Any] = {"do_sample": False, "stop_at_eos": False, "verbose": False}
        return model.generate(expected(folder)["input_ids"][:1], new, prefix_length=length, **options)
    stack, name = f"{key[0]}_blocks", {"stack_in": "injection", "stack_out": "state_post"}.get(key[2:], key[2:])
    return cache.stack(f"{stack}.{name}")


def given(folder: str, dtype: torch.dtype = torch.float32, rows: Any = slice(None)) -> dict[str, Any]:
    """What the reference was given beside tokens: the initial state, where the family draws one."""
    states = expected(folder).get("input_states")
    return {} if states is None else {"initial_state": states[rows].to(dtype)}


def stopped(model: LoopedModel, loops: int, after: int) -> dict[str, Any]:
    """Options of a run of `after` loops that is the beginning of one of `loops`: where loops have a time, its steps."""
    return {"n_loops": after, **({"step_sizes": [1 / loops] * after} if model.cfg.loop_time else {})}


def without_injection(model: LoopedModel) -> LoopedModel:
    """The recursive nanochat whose injection hands on the state alone, as the paper's variant without it."""
    copied = LoopedModel.from_pretrained(PARITY / "nanochat-recursive")
    d = model.cfg.d_model
    with torch.no_grad():
        copied.transformer.injection.weight.copy_(torch.cat((torch.zeros(d, d), torch.eye(d)), dim=1))
    return copied


def _layers(cache: LoopedCache, stack: str, name: str) -> Tensor:
    layers = getattr(cache.cfg, f"n_{stack}")
    return torch.stack([cache[f"{stack}.{layer}.{ENDS[name]}"] for layer in range(layers)])


def _passes(name: str) -> Callable[[LoopedModel, LoopedCache], Tensor]:
    """Of Looped-GPT: the loops, and then the plain pass."""
    return lambda model, cache: torch.cat((cache.stack(name), _layers(cache, "coda", name)[None]))


def _states(cache: LoopedCache) -> Tensor:
    """The state entering the first loop, and those leaving each."""
    return torch.cat((cache["hook_state_init"][None], cache.stack("state_post")))


def _read(model: LoopedModel, cache: LoopedCache, states: Tensor) -> Tensor:
    return torch.stack([model.readout(state, cache.run.tokens) for state in states])


def _exit_loops(model: LoopedModel, cache: LoopedCache, name: str) -> Tensor:
    """After which loop LoopUS stops each prompt: what its last position says."""
    stored = expected("loopus-qwen3")
    if name == "exit_conv":
        states = _states(cache)[:, :, -1]
        stops = (states[1:] - states[:-1]).norm(dim=-1) < stored["exit_conv.epsilon"]
        return first_met(stops).nan_to_num(len(stops) - 1).long()
    rule = {"exit": GateChanceRule, "exit_cdf": GateRule}[name](float(stored[f"{name}.threshold"]))
    return trace_exits(model, cache.run.tokens, cache.run.n_loops, rules=[type(rule)], positions=-1).exit_loops(rule)


def _exit_logits(model: LoopedModel, cache: LoopedCache, name: str) -> Tensor:
    loops = _exit_loops(model, cache, name)
    return _read(model, cache, cache.stack("state_post"))[loops, torch.arange(len(loops))]


def _exit_step(model: LoopedModel, cache: LoopedCache) -> Tensor:
    """What the exit head of LoopUS says of the step that the layers propose."""
    assert model.transformer.exit_logit is not None
    return model.transformer.exit_logit(cache.stack("core_out") - cache.stack("state_pre"))[..., -1]


def _decoded(folder: str) -> Callable[[LoopedModel, LoopedCache], Tensor]:
    """What a cache with a slot for every loop decodes: the whole run's."""
    first = int(expected(folder)["decode.prefill_len"]) - 1
    return lambda model, cache: model(cache.run.tokens, **given(folder))[:, first:]


def _value_parts(model: LoopedModel, cache: LoopedCache, where: str, name: str) -> Tensor:
    """Of Parcae: the gates of every call, or what they multiply, which is the same in all."""
    sites = [f"{where}.loop.{t}" for t in range(cache.run.n_loops)] if where.startswith("blocks") else [where]
    found = torch.stack([cache[f"{site}.attn.hook_value_{name}"] for site in sites])
    return found if name == "gate" else found[0].flatten(-2)


def _before_gates(model: LoopedModel, cache: LoopedCache, site: str) -> Tensor:
    """Of LoopFormer: what sub-layers give before the loop's time gates it."""
    found = []
    for layer, block in enumerate(model.transformer.blocks):
        last = block.attn.o if site.startswith("attn") else block.mlp.down
        found.append(last(cache.stack(site, layer).flatten(3)))
    return torch.stack(found, dim=1)


def _times(model: LoopedModel, cache: LoopedCache, column: int) -> Tensor:
    """Of LoopFormer: when each loop begins, or its step size, for both prompts."""
    clock = model.frame(cache.run).clock
    assert clock is not None
    return clock[:, column, None].expand(-1, 2)


def _time_embeds(model: LoopedModel, cache: LoopedCache, column: int) -> Tensor:
    embed = (model.transformer.time_embed, model.transformer.step_embed)[column]
    times = _times(model, cache, column)[:, 0]
    return torch.stack([embed(time) for time in times])[:, None].expand(-1, 2, -1)


# What is stored of one family alone, or means something else in it.
OWN: dict[tuple[str, str], Callable[[LoopedModel, LoopedCache], Tensor]] = {
    ("looped-gpt", "resid_post"): _passes("resid_post"),
    ("looped-gpt", "pattern"): _passes("pattern"),
    ("looped-gpt", "loop_in"): lambda model, cache: _states(cache),
    ("looped-gpt", "logits_per_iteration"): lambda model, cache: _read(model, cache, _states(cache)),
    ("looped-gpt", "logits.T1"): lambda model, cache: _read(model, cache, _states(cache)[:1])[0],
    ("loopus-qwen3", "gate_decay"): lambda model, cache: cache.stack("update_gate"),
    ("loopus-qwen3", "q_logit"): lambda model, cache: cache.stack("exit_gate")[..., -1],
    ("loopus-qwen3", "q_logit_train"): _exit_step,
    ("loopus-qwen3", "decode.logits"): _decoded("loopus-qwen3"),
    ("mobilellm-ls", "call_resid_post"): lambda model, cache: cache.stack("resid_post")[0],
    ("mobilellm-ls", "call_pattern"): lambda model, cache: cache.stack("pattern")[0],
    ("albert", "layer_resid_post"): lambda model, cache: cache.stack("resid_post")[:, 0],
    ("albert", "layer_pattern"): lambda model, cache: cache.stack("pattern")[:, 0],
    ("albert", "embeddings_out"): lambda model, cache: model.transformer.ln_embed.affine(cache["ln_embed.normalized"]),
    ("albert", "embedding_hidden_mapping"): lambda model, cache: cache["hook_state_init"],
    ("albert", "mlm_transform_out"): lambda model, cache: cache["hook_head_in"],
    ("loopformer", "attn_out"): partial(_before_gates, site="attn.hook_z"),
    ("loopformer", "mlp_out"): partial(_before_gates, site="mlp.hook_post"),
    ("loopformer", "modulation"): lambda model, cache: cache.stack("modulation")[:, :, :, 0],
    ("loopformer", "condition"): lambda model, cache: cache.stack("condition")[:, :, 0],
    ("loopformer", "time"): partial(_times, column=0),
    ("loopformer", "dt"): partial(_times, column=1),
    ("loopformer", "time_emb"): partial(_time_embeds, column=0),
    ("loopformer", "dt_emb"): partial(_time_embeds, column=1),
    ("parcae", "decode_full.logits"): _decoded("parcae"),
    ("parcae", "injection_decay"): lambda model, cache: cache.stack("injection_decay")[-1, 0, 0],
    ("parcae", "injection_dt"): lambda model, cache: cache.stack("injection_step")[-1, 0, 0],
    ("parcae", "prelude_norm_out"): lambda model, cache: cache.stack("injection_in")[0],
    ("parcae", "readout_linear_out"): lambda model, cache: cache["hook_state_out"],
}
for name in ("exit", "exit_cdf", "exit_conv"):
    OWN["loopus-qwen3", f"{name}.logits"] = partial(_exit_logits, name=name)
    OWN["loopus-qwen3", f"{name}.steps"] = lambda model, cache, name=name: _exit_loops(model, cache, name) + 1

for part, where in (("prelude", "prelude.1"), ("core", "blocks.1"), ("coda", "coda.1")):
    OWN["parcae", f"ve_gate.{part}.1"] = partial(_value_parts, where=where, name="gate")
    OWN["parcae", f"value_embed.{part}.1"] = partial(_value_parts, where=where, name="embed")

STORED = [
    (folder, key)
    for folder in FOLDERS
    for key in expected(folder)
    if (folder, key) in OWN or not (key.startswith((*OTHER_CACHE, *GIVEN)) or key.endswith("grad_embed_unscaled"))
]


@torch.no_grad()
def ours(folder: str, key: str) -> Tensor:
    """What our model computes for a stored key."""
    tokens = expected(folder)["input_ids"]
    model, logits, cache = ran(folder)
    if (folder, key) in OWN:
        return OWN[folder, key](model, cache)
    if model.cfg.two_states is not None:
        return of_two_stacks(folder, key)
    if key.startswith("noinject."):
        model, key = without_injection(model), key.removeprefix("noinject.")
        logits, cache = model.run_with_cache(tokens, 6)
    if key in UNLOOPED and "loop_layers" in expected(folder):
        model, logits, cache = ran(folder, looped=False)
    if key == "logits":
        return logits
    if key == "logits.default":
        return model(tokens)
    if key.startswith("logits.steps."):
        steps = expected(folder)[key.removeprefix("logits.")].tolist()
        return model(tokens, n_loops=len(steps), step_sizes=steps)
    if key.startswith("logits.T"):
        return model(tokens, n_loops=loops_for(folder, int(key[8:])), **given(folder))
    if key == "logits_per_iteration":
        return _read(model, cache, cache.stack("state_post"))
    if key in (*HEAD_INPUT, "logits_before_softcap"):
        x = model.transformer.ln_final.affine(cache["ln_final.hook_normalized"])
        return x @ model.transformer.unembed.weight.T if key == "logits_before_softcap" else x
    if key in STACKED:
        return cache.stack(STACKED[key])
    if key in ("layer_resid_post", "layer_pattern"):
        return cache.stack(key.removeprefix("layer_"))[0]
    if key in ("layer0_in", "embed_normed", "embed"):
        name = "prelude.0" if model.cfg.n_prelude else "blocks.0.loop.0"
        return cache[f"{name}.hook_resid_pre"]
    if key == "hidden_states":
        last = model.transformer.ln_final.affine(cache["ln_final.hook_normalized"])
        return torch.cat((cache["resid_pre", 0, 0][None], cache.stack("resid_post")[0][:-1], last[None]))
    stack, _, rest = key.partition("_")
    assert stack in ("prelude", "coda"), f"{key} is stored, but no test knows it"
    return _layers(cache, stack, rest)
