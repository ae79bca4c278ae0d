"""TransformerLens's tools on the realised-depth view: each runs on any bridge, and some are done again by hand.

`python tests/unrolled_tools.py` writes the table of docs/unrolled-tools.md; test_unrolled_tools.py checks it.
"""

from __future__ import annotations

import copy
import json
import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import torch
from families import FOLDERS, load
from helpers import FAMILIES, PARITY, TINY, make, parity, word_tokenizer
from safetensors.torch import load_file
from torch import Tensor
from transformer_lens import ActivationCache, SVDInterpreter, patching
from transformer_lens.config import TransformerBridgeConfig
from transformer_lens.head_detector import detect_head
from transformer_lens.model_bridge import TransformerBridge
from transformer_lens.model_bridge.sources._bridge_builder import build_bridge_from_module
from transformer_lens.model_bridge.sources.native.model import NativeModel
from transformer_lens.tools import analysis
from transformer_lens.tools.analysis.attribution_patching import EdgeAttributionConfig, attribution_patch, faithfulness
from transformer_lens.tools.analysis.projection_kernel import attention_head_subspace_affinity
from transformers import AutoConfig, AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from tl_looped import LoopedModel
from tl_looped.engine.errors import InputError
from tl_looped.engine.schedule import HookSite
from tl_looped.unrolled import UnrolledModel

LOOPS = 2
# Without injection and loop norms the sum holds; with one loop Ouro's does too, though not by head.
FORMS: dict[str, tuple[dict[str, Any], int]] = {
    "feedforward but for its loops": ({"n_prelude": 1, "n_core": 1, "n_coda": 1}, LOOPS),
    "damped": ({"n_prelude": 1, "n_core": 1, "n_coda": 1, "loop_update": "damped", "loop_step": 0.5}, LOOPS),
    "Ouro, one loop": (TINY["ouro"], 1),
    "prelude added in every loop": ({**TINY["added"], "n_core": 1}, LOOPS),
}
PLAIN = next(iter(FORMS))
STORED = (*FAMILIES, *FOLDERS, "hrm-act", "trm")  # every folder of tests/parity
CLEAN, CORRUPTED = torch.tensor([[2, 5, 7], [4, 2, 9]]), torch.tensor([[2, 8, 7], [4, 6, 9]])
TEXT = "a b c a b"


def stored(name: str) -> LoopedModel:
    """The model of a folder of tests/parity."""
    if name in FAMILIES:
        return parity(name)
    return load(name) if name in FOLDERS else LoopedModel.from_pretrained(PARITY / name)


def prompt(model: Any, tokens: Tensor) -> Tensor:
    """Tokens, behind those of a puzzle where the model needs them."""
    cfg = getattr(model, "looped", model).cfg
    first = getattr(cfg, "puzzles", None) and cfg.puzzle_tokens(0)
    return torch.cat([torch.tensor(first).expand(len(tokens), -1), tokens], dim=1) if first else tokens


def transformers_bridge(name: str, looped: LoopedModel, n_loops: int) -> TransformerBridge:
    """transformers' model of a feedforward family, its layers in the order in which they run, in TransformerLens's."""
    fields = json.loads((PARITY / name / "config.json").read_text())
    layers = looped.cfg.layers()
    order = [layers.index((stack, layer)) for stack, layer, _ in looped.cfg.schedule(n_loops).layer_calls()]
    fields["n_layer" if fields["model_type"] == "gpt2" else "num_hidden_layers"] = len(order)
    if "layer_types" in fields:
        fields["layer_types"] = [fields["layer_types"][i] for i in order]
    config = AutoConfig.for_model(**fields)
    model = AutoModelForCausalLM.from_config(config).eval()
    given: dict[int, dict[str, Tensor]] = {}
    whole = {}
    for key, weight in load_file(PARITY / name / "model.safetensors").items():
        found = re.fullmatch(r"(.*(?:layers|h)\.)(\d+)(\..*)", key)
        if found is None:
            whole[key] = weight
        else:
            given.setdefault(int(found[2]), {})[f"{found[1]}@{found[3]}"] = weight
    for depth, layer in enumerate(order):
        whole |= {key.replace("@", str(depth)): weight for key, weight in given[layer].items()}
    missing, unexpected = model.load_state_dict(whole, strict=False)
    assert not unexpected and set(missing) <= {"lm_head.weight"}, (missing, unexpected)
    return build_bridge_from_module(model, fields["architectures"][0], hf_config=config)


def native_bridge(looped: LoopedModel, n_loops: int) -> TransformerBridge:
    """TransformerLens's own model with the weights of one of learned positions, RMS norms and plain MLPs."""
    cfg, schedule = looped.cfg, looped.cfg.schedule(n_loops)
    sizes = {name: getattr(cfg, name) for name in ("d_model", "d_head", "n_heads", "d_mlp", "d_vocab", "n_ctx", "eps")}
    kinds = {"act_fn": "gelu", "normalization_type": "RMS", "positional_embedding_type": "standard"}
    config = TransformerBridgeConfig(**sizes, **kinds, n_layers=schedule.depth, architecture="TransformerLensNative")
    config.uses_rms_norm = config.final_rms = True
    model = NativeModel(config).eval()
    state, ours = model.state_dict(), looped.transformer
    with torch.no_grad():
        for name, weight in state.items():
            if name.endswith("bias"):
                weight.zero_()
        model.tok_embed.weight.copy_(ours.embed.weight)
        model.pos.weight.copy_(ours.pos_embed.weight)
        model.head.weight.copy_(ours.unembed.weight)
        model.ln_out.weight.copy_(ours.ln_final.weight)
        for theirs, (stack, layer, _) in zip(model.layers, schedule.layer_calls(), strict=True):
            block = getattr(ours, stack)[layer]
            for part in "qkvo":
                getattr(theirs.attn, part).weight.copy_(getattr(block.attn, part).weight)
            theirs.ln1.weight.copy_(block.ln1.weight)
            theirs.ln2.weight.copy_(block.ln2.weight)
            theirs.mlp.fc_in.weight.copy_(block.mlp.up.weight)
            theirs.mlp.fc_out.weight.copy_(block.mlp.down.weight)
    return build_bridge_from_module(model, "TransformerLensNative", tl_config=config)


def llama_bridge(looped: LoopedModel, n_loops: int, folded: bool = False) -> TransformerBridge:
    """transformers' Llama with a pre-norm model's weights copied in, in TransformerLens's bridge; without the hub."""
    cfg, schedule = looped.cfg, looped.cfg.schedule(n_loops)
    sizes = {"hidden_size": cfg.d_model, "intermediate_size": cfg.d_mlp, "num_hidden_layers": schedule.depth}
    sizes |= {"num_attention_heads": cfg.n_heads, "num_key_value_heads": cfg.kv_heads, "head_dim": cfg.d_head}
    sizes |= {"vocab_size": cfg.d_vocab, "max_position_embeddings": cfg.n_ctx}
    other = {"rms_norm_eps": cfg.eps, "rope_theta": 10000.0, "tie_word_embeddings": False}
    config = LlamaConfig(**sizes, **other)
    llama = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        llama.model.embed_tokens.weight.copy_(looped.W_E)
        llama.lm_head.weight.copy_(looped.W_U.T)
        llama.model.norm.weight.copy_(looped.transformer.ln_final.weight)
        for theirs, (stack, layer, _) in zip(llama.model.layers, schedule.layer_calls(), strict=True):
            ours = getattr(looped.transformer, stack)[layer]
            theirs.input_layernorm.weight.copy_(ours.ln1.weight)
            theirs.post_attention_layernorm.weight.copy_(ours.ln2.weight)
            for part in "qkvo":
                getattr(theirs.self_attn, f"{part}_proj").weight.copy_(getattr(ours.attn, part).weight)
            for part in ("gate", "up", "down"):
                getattr(theirs.mlp, f"{part}_proj").weight.copy_(getattr(ours.mlp, part).weight)
    built = build_bridge_from_module(llama, "LlamaForCausalLM", hf_config=config)
    built._tokenizer = looped.tokenizer  # setting `tokenizer` would ask the hub for another
    built.cfg.default_prepend_bos = built.cfg.tokenizer_prepends_bos = False
    if folded:
        built.enable_compatibility_mode()
    return built


def gpt2_bridge(looped: LoopedModel, n_loops: int) -> TransformerBridge:
    """The same as `native_bridge`, in transformers' GPT-2 with other norms: TransformerLens splits its inputs."""
    cfg, schedule, ours = looped.cfg, looped.cfg.schedule(n_loops), looped.transformer
    sizes = {"n_embd": cfg.d_model, "n_head": cfg.n_heads, "n_inner": cfg.d_mlp, "n_positions": cfg.n_ctx}
    more = {"activation_function": "gelu", "layer_norm_epsilon": cfg.eps}
    config = GPT2Config(**sizes, **more, vocab_size=cfg.d_vocab, n_layer=schedule.depth)
    model = GPT2LMHeadModel(config).eval()
    for bias in (weight for name, weight in model.named_parameters() if name.endswith("bias")):
        bias.data.zero_()

    def norm(weight: Tensor) -> torch.nn.Module:
        made = torch.nn.RMSNorm(cfg.d_model, cfg.eps)
        made.weight.data.copy_(weight.data)
        return made

    model.transformer.wte.weight.data.copy_(ours.embed.weight.data)
    model.transformer.wpe.weight.data.copy_(ours.pos_embed.weight.data)
    model.transformer.ln_f = norm(ours.ln_final.weight)
    for theirs, (stack, layer, _) in zip(model.transformer.h, schedule.layer_calls(), strict=True):
        block = getattr(ours, stack)[layer]
        theirs.ln_1, theirs.ln_2 = norm(block.ln1.weight), norm(block.ln2.weight)
        qkv = torch.cat([getattr(block.attn, part).weight.data for part in "qkv"])
        maps = {theirs.attn.c_attn: qkv, theirs.attn.c_proj: block.attn.o.weight.data}
        maps |= {theirs.mlp.c_fc: block.mlp.up.weight.data, theirs.mlp.c_proj: block.mlp.down.weight.data}
        for one, weight in maps.items():
            one.weight.data.copy_(weight.T)
    return build_bridge_from_module(model, "GPT2LMHeadModel", hf_config=config)


@lru_cache
def looped(form: str) -> LoopedModel:
    """The model of a form."""
    if form in FORMS:
        return make(tokenizer=word_tokenizer(), **FORMS[form][0])
    model = copy.copy(stored(form))
    model.tokenizer = word_tokenizer()
    return model


def loops(form: str) -> int:
    """How many of its loops are counted out."""
    return FORMS[form][1] if form in FORMS else LOOPS


@lru_cache
def view(form: str, folded: bool = False) -> UnrolledModel:
    """Its view."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made = looped(form).unrolled(loops(form))
    if folded:
        made.enable_compatibility_mode()
    return made


@lru_cache
def bridge(form: str, folded: bool = False) -> TransformerBridge | None:
    """What the view has to equal, if there is: TransformerLens's bridge of a feedforward model of the same layers."""
    model = looped(form)
    if form in (PLAIN, "mobilellm-ls"):
        return llama_bridge(model, loops(form), folded)
    if not form.startswith("ff-") and form != "base-loop":
        return None
    plain = native_bridge if folded else gpt2_bridge
    build = partial(transformers_bridge, form) if form.startswith("ff-") else plain
    built = build(model, loops(form))
    built._tokenizer = model.tokenizer  # setting `tokenizer` would ask the hub for another
    built.cfg.default_prepend_bos = built.cfg.tokenizer_prepends_bos = False
    if folded:
        built.enable_compatibility_mode()
    return built


@dataclass(frozen=True)
class Tool:
    """A tool of TransformerLens.

    Attributes:
        run: it, on a bridge.
        by_hand: the same numbers from a looped model and its loop count; None where it is right on `PLAIN` alone.
        folded: whether it needs weights to be processed.
        as_bridge: whether TransformerLens's own numbers on a bridge are right, and so have to be met.
    """

    run: Callable[[Any], Tensor]
    by_hand: Callable[[LoopedModel, int], Tensor] | None = None
    folded: bool = False
    as_bridge: bool = True


# The refusals of TransformerLens's own that count as such.
_THEIRS = "exposes no `ln_final` component|per-head attention outputs are normalized|JacobianLens requires causal"
_THEIRS += r"|\(GQA/MQA\), so its K/V inputs are not per query head"


def outcome(tool: Tool, form: str) -> str:
    """Run a tool on the view of a form, and say "right" or what refused; a wrong number is an error."""
    model, n_loops = looped(form), loops(form)
    try:
        found = tool.run(view(form, tool.folded))
    except (InputError, ValueError) as error:
        if not isinstance(error, InputError) and not re.search(_THEIRS, str(error)):
            raise
        return f"refuses: {error}"
    wanted = []
    if tool.as_bridge and bridge(form) is not None:
        wanted.append(tool.run(bridge(form, tool.folded)))
    if tool.by_hand is not None:
        wanted.append(tool.by_hand(model, n_loops))
    if not wanted:
        raise AssertionError(f"neither refused on {form!r} nor known to be right there")
    for one in wanted:
        torch.testing.assert_close(found.detach(), one.detach(), rtol=1e-3, atol=2e-5)
    return "right"


# The tools.


def clean(model: Any) -> Tensor:
    """The clean prompts."""
    return prompt(model, CLEAN)


def corrupted(model: Any) -> Tensor:
    """The corrupted ones."""
    return prompt(model, CORRUPTED)


def cache_of(model: Any, tokens: Tensor | None = None) -> ActivationCache:
    """The cache of a bridge."""
    with torch.no_grad():
        return model.run_with_cache(clean(model) if tokens is None else tokens)[1]


def metric(logits: Tensor) -> Tensor:
    """What is patched for."""
    return logits[:, -1, 3].sum()


def site(model: LoopedModel, n_loops: int, depth: int, component: str) -> str:
    """The looped model's name of a site of a layer of the view."""
    return HookSite(component, *model.cfg.schedule(n_loops).at_depth(depth)).name


def activations(model: LoopedModel, n_loops: int, component: str, tokens: Tensor | None = None) -> list[Tensor]:
    """A site of every layer call."""
    with torch.no_grad():
        tokens = clean(model) if tokens is None else tokens
        cache = model.run_with_cache(tokens, n_loops, names_filter=lambda name: True)[1].cache_dict
    return [cache[site(model, n_loops, depth, component)] for depth in range(model.cfg.schedule(n_loops).depth)]


def embedded(model: LoopedModel, n_loops: int) -> list[Tensor]:
    """What the embeddings write."""
    with torch.no_grad():
        cache = model.run_with_cache(clean(model), n_loops, names_filter=lambda name: "embed" in name)[1].cache_dict
    return [cache[name] for name in ("hook_embed", "hook_pos_embed") if name in cache]


def states(model: LoopedModel, n_loops: int) -> Tensor:
    """The residual stream before, in the middle of and after every layer."""
    before, middle = (activations(model, n_loops, f"hook_resid_{where}") for where in ("pre", "mid"))
    last = activations(model, n_loops, "hook_resid_post")[-1]
    return torch.stack([x for pair in zip(before, middle, strict=True) for x in pair] + [last])


def writes(model: LoopedModel, n_loops: int) -> Tensor:
    """What the embedding and every layer add."""
    both = zip(*(activations(model, n_loops, f"hook_{part}_out") for part in ("attn", "mlp")), strict=True)
    return torch.stack([*embedded(model, n_loops), *(x for pair in both for x in pair)])


def lens(model: LoopedModel, n_loops: int) -> Tensor:
    """Every state through the norm before the head."""
    final = model.cfg.has_final_weights
    norm = model.transformer.ln_final if final else model.transformer.ln_loop
    return model.transformer.unembed(norm(states(model, n_loops)))


def patched(component: str, head: bool = False) -> Callable[[LoopedModel, int], Tensor]:
    """The metric with one site of one layer (one position, or head) from the clean run."""

    def sweep(model: LoopedModel, n_loops: int) -> Tensor:
        rows = []
        for depth, one in enumerate(activations(model, n_loops, component)):
            for place in range(one.shape[2 if head else 1]):

                def write(x: Tensor, hook: Any, clean: Tensor = one, place: int = place) -> Tensor:
                    x = x.clone()
                    where = (slice(None), slice(None), place) if head else (slice(None), place)
                    x[where] = clean[where]
                    return x

                name = site(model, n_loops, depth, component)
                rows.append(metric(model.run_with_hooks(corrupted(model), n_loops, fwd_hooks=[(name, write)])))
        return torch.stack(rows).unflatten(0, (model.cfg.schedule(n_loops).depth, -1))

    return torch.no_grad()(sweep)


def act_patch(name: str) -> Callable[[Any], Tensor]:
    """One of `transformer_lens.patching`."""
    function = getattr(patching, f"get_act_patch_{name}")
    return torch.no_grad()(lambda model: function(model, corrupted(model), cache_of(model), metric))


def direct_path(model: Any) -> Tensor:
    """From the first layer's head 1 into all queries behind it."""
    caches = cache_of(model), cache_of(model, corrupted(model))
    with torch.no_grad():
        return patching.get_act_patch_direct_path(model, corrupted(model), *caches, metric, 0, 1, "q")


def edges(model: Any) -> Tensor:
    """Scores of all edges."""
    config = EdgeAttributionConfig(granularity="edge")
    return torch.tensor(
        list(attribution_patch(model, clean(model), corrupted(model), metric, config).edge_scores.values())
    )


def recovered(model: Any) -> Tensor:
    """How much the 20 largest edges recover."""
    result = attribution_patch(
        model, clean(model)[:1], corrupted(model)[:1], metric, EdgeAttributionConfig(granularity="edge")
    )
    return torch.tensor(
        faithfulness(model, clean(model)[:1], corrupted(model)[:1], metric, result.top_edges(k=20)).recovered
    )


def node_scores(model: LoopedModel, n_loops: int) -> Tensor:
    """(clean − corrupted) · gradient for the embedding, every head's z and every MLP, averaged over prompts."""
    depth, grads = model.cfg.schedule(n_loops).depth, {}
    names = ["hook_embed"]
    for d in range(depth):
        names += [site(model, n_loops, d, "attn.hook_z"), site(model, n_loops, d, "hook_mlp_out")]
    keep = [(name, lambda grad, hook: grads.__setitem__(hook.name, grad)) for name in names]
    with model.hooks(bwd_hooks=keep):
        metric(model(corrupted(model), n_loops)).backward()
    model.zero_grad()
    with torch.no_grad():
        both = (model.run_with_cache(t, n_loops, names_filter=names)[1] for t in (clean(model), corrupted(model)))
        ours, theirs = both
    # By position, and for z by position and head.
    scores = [((ours[name] - theirs[name]) * grads[name]).sum(-1).flatten(1).mean(0) for name in names]
    return torch.cat(scores)


def by_node(model: Any) -> Tensor:
    """The same from TransformerLens: the embedding's positions, then each layer's heads and MLP by position."""
    result = attribution_patch(model, clean(model), corrupted(model), metric).node_scores
    order = {"embed": 0, "attn_head_out": 1, "mlp_out": 2}
    nodes = sorted(result, key=lambda n: (n.layer or 0, order[n.kind], n.position, n.head or 0))
    return torch.tensor([result[node] for node in nodes])


def jacobians(model: Any) -> Tensor:
    """The Jacobian lens at layer 0 and at the last but one."""
    layers = [0, model.cfg.n_layers - 2]
    options = {"corpus": "words", "skip_first_positions": 1, "show_progress": False}
    fitted = analysis.JacobianLens.fit(model, [TEXT], source_layers=layers, **options)
    return torch.stack([fitted.jacobians[layer] for layer in sorted(set(layers))])


def jacobians_by_hand(model: LoopedModel, n_loops: int) -> Tensor:
    """The same by automatic differentiation of the looped model: the last layer's output by an earlier one's."""
    depth, tokens, kept = model.cfg.schedule(n_loops).depth, model.to_tokens(TEXT), {}
    layers = sorted({0, depth - 2, depth - 1})

    def keep(x: Tensor, hook: Any) -> None:
        kept[hook.name] = x

    names = [site(model, n_loops, d, "hook_resid_post") for d in layers]
    model.run_with_hooks(tokens, n_loops, fwd_hooks=[(name, keep) for name in names])
    *sources, target = (kept[name] for name in names)
    where = slice(1, tokens.shape[1] - 1)  # positions that count, as sources and as targets
    found = []
    for source in sources:
        rows = [
            torch.autograd.grad(target[0, where, i].sum(), source, retain_graph=True)[0][0, where].mean(0)
            for i in range(model.cfg.d_model)
        ]
        found.append(torch.stack(rows))
    return torch.stack(found)


def singular(model: Any) -> Tensor:
    """SVDInterpreter's readings of an MLP, up to sign."""
    return SVDInterpreter(model).get_singular_vectors("w_out", layer_index=1, num_vectors=3).abs()


def singular_by_hand(model: LoopedModel, n_loops: int) -> Tensor:
    """The same from the looped model's weights."""
    stack, layer, _ = model.cfg.schedule(n_loops).at_depth(1)
    vectors = torch.linalg.svd(getattr(model.transformer, stack)[layer].mlp.W_out)[2]
    return (model.W_U.T @ vectors[:3].T).unsqueeze(1).abs()


def previous_token(model: LoopedModel, n_loops: int) -> Tensor:
    """How much every head looks at the token before."""
    patterns = torch.stack(activations(model, n_loops, "attn.hook_pattern", model.to_tokens(TEXT)))[:, 0]
    return patterns.diagonal(-1, 2, 3).sum(-1) / patterns.sum((-2, -1))


def per_head(part: str) -> Callable[[LoopedModel, int], Tensor]:
    """A weight of attention in every layer call."""
    return lambda model, n_loops: torch.stack(
        [
            getattr(getattr(model.transformer, stack)[layer].attn, part)
            for stack, layer, _ in model.cfg.schedule(n_loops).layer_calls()
        ]
    )


def affinity(model: LoopedModel, n_loops: int) -> Tensor:
    """|cos| between what heads write and what heads' queries read, as subspaces, squared and summed."""
    write = torch.linalg.qr(per_head("W_O")(model, n_loops).transpose(-2, -1))[0].flatten(0, 1)
    read = torch.linalg.qr(per_head("W_Q")(model, n_loops))[0].flatten(0, 1)
    return torch.einsum("ado,bdq->aboq", write, read).pow(2).sum((-2, -1))


def affinities(model: Any) -> Tensor:
    """The same from TransformerLens."""
    scores = attention_head_subspace_affinity(model, target_role="Q", layer_order="all").scores
    return scores.flatten(2).flatten(0, 1)


def greedy(model: LoopedModel, n_loops: int) -> Tensor:
    """Two tokens more, the most likely each time."""
    tokens = clean(model)[:1]
    for _ in range(2):
        tokens = torch.cat([tokens, model(tokens, n_loops)[:, -1].argmax(-1)[:, None]], dim=1)
    return tokens


def generated(model: Any) -> Tensor:
    """The same from TransformerLens."""
    options = {"do_sample": False, "return_type": "tokens", "verbose": False, "stop_at_eos": False}
    return model.generate(clean(model)[:1], max_new_tokens=2, **options)


def continued(layer: int) -> Callable[[Any], Tensor]:
    """Logits, going on from the residual stream at a layer; -2: the first layer of the last loop."""
    return torch.no_grad()(lambda model: model(cache_of(model)["resid_pre", layer], start_at_layer=layer))


def stopped(model: Any) -> Tensor:
    """The residual stream before layer 2."""
    with torch.no_grad():
        return model(clean(model), stop_at_layer=1)


def total(model: Any) -> Tensor:
    """Direct logit attribution of heads."""
    return analysis.direct_logit_attribution(model, clean(model), 3, unit="head").attribution


def attributed(model: Any) -> Tensor:
    """What the parts of the residual stream say to a token."""
    cache = cache_of(model)
    return cache.logit_attrs(cache.decompose_resid(), 3)


def run(model: LoopedModel, n_loops: int) -> Tensor:
    """Logits."""
    return model(clean(model), n_loops)


TOOLS: dict[str, Tool] = {
    "forward": Tool(lambda m: m(clean(m)), run),
    "loss": Tool(lambda m: m(clean(m), return_type="loss"), lambda m, n: m(clean(m), n, return_type="loss")),
    "generate": Tool(generated, greedy),
    "forward(stop_at_layer)": Tool(stopped, lambda m, n: activations(m, n, "hook_resid_pre")[1]),
    "forward(start_at_layer) in the first loop": Tool(continued(0), run),
    "enable_compatibility_mode": Tool(
        lambda m: m(clean(m)).log_softmax(-1), lambda m, n: run(m, n).log_softmax(-1), folded=True
    ),
    "W_Q, W_O": Tool(
        lambda m: torch.cat([m.W_Q.flatten(), m.W_O.flatten()]),
        lambda m, n: torch.cat([per_head(part)(m, n).flatten() for part in ("W_Q", "W_O")]),
    ),
    "cache.accumulated_resid": Tool(
        lambda m: torch.cat([(c := cache_of(m)).accumulated_resid(incl_mid=True), c["resid_post", -1][None]]),
        lambda m, n: torch.cat([states(m, n), states(m, n)[-1:]]),
    ),
    "cache.decompose_resid": Tool(lambda m: cache_of(m).decompose_resid(), writes),
    "cache.logit_attrs": Tool(attributed, folded=True),
    "cache.stack_head_results": Tool(lambda m: cache_of(m).stack_head_results(incl_remainder=True)),
    "cache.stack_neuron_results": Tool(lambda m: cache_of(m).stack_neuron_results(2)),
    "cache.get_full_resid_decomposition": Tool(lambda m: cache_of(m).get_full_resid_decomposition()),
    "logit_lens": Tool(lambda m: analysis.logit_lens(m, clean(m), incl_mid=True, positions=None).values, lens),
    "direct_logit_attribution": Tool(total, folded=True),
    "get_act_patch_resid_pre": Tool(act_patch("resid_pre"), patched("hook_resid_pre")),
    "get_act_patch_resid_mid": Tool(act_patch("resid_mid"), patched("hook_resid_mid"), as_bridge=False),
    "get_act_patch_mlp_out": Tool(act_patch("mlp_out"), patched("hook_mlp_out")),
    "get_act_patch_attn_head_q_all_pos": Tool(act_patch("attn_head_q_all_pos"), patched("attn.hook_q", head=True)),
    "get_act_patch_attn_head_out_all_pos": Tool(act_patch("attn_head_out_all_pos"), patched("attn.hook_z", head=True)),
    "get_act_patch_direct_path": Tool(direct_path),
    "attribution_patch by node": Tool(by_node, node_scores),
    "attribution_patch by edge": Tool(edges),
    "faithfulness": Tool(recovered),
    "JacobianLens": Tool(jacobians, jacobians_by_hand),
    "SVDInterpreter": Tool(singular, singular_by_hand),
    "detect_head": Tool(lambda m: detect_head(m, TEXT, "previous_token_head"), previous_token),
    "attention_head_subspace_affinity": Tool(affinities, affinity),
    "all_composition_scores": Tool(lambda m: m.all_composition_scores("K").scores),
}


def table() -> str:
    """All tools on all forms, as a page."""
    lines = ["| model | refuse there |", "| --- | --- |"]
    for form in [*FORMS, *STORED]:
        refusing = [name for name, tool in TOOLS.items() if outcome(tool, form) != "right"]
        lines.append(f"| {form} | {', '.join(refusing) or 'none'} |")
    tools = "".join(f"- {name}\n" for name in TOOLS)
    return f"{_INTRODUCTION}\n{tools}\n{_TABLE}\n" + "\n".join(lines) + "\n"


PAGE = Path(__file__).parents[1] / "docs" / "unrolled-tools.md"
_INTRODUCTION = """# TransformerLens's tools on a looped model

`model.unrolled(n_loops)` is a TransformerBridge of all layer calls in a row, on the looped model's own Parameters, for
every family. It runs the looped model's own code, so that without hooks its logits are the same to the bit. A tool is
*right* there where its numbers are those of the looped model's own calls, done by hand; and, where the layers in a row
are a model that TransformerLens has a bridge of, the numbers of that bridge with copied weights (the feedforward
families in transformers' own code, MobileLLM as a Llama, Base-Loop as a GPT-2 with other norms). What would be wrong
*refuses*, with the reason and what to call instead. This page is written by `python tests/unrolled_tools.py` and
checked by the tests. (TransformerLens's `get_act_patch_resid_mid` on its own bridges writes to the MLP's input only;
here it writes to the residual stream.)

What the view does not do: its hooks do not act in the looped model, nor the other way round; loop count and initial
state are those it was made with, and step sizes all alike; a prefix is told by a whole attention mask. A hook's loop is
`view.names.loop(hook.name)`. Of two stacks, the layers of both are in one row, and what is a loop's own, such as
`L_blocks.loop.3.hook_state_post`, is called `L.loop.3.hook_state_post`.

The tools:
"""
_TABLE = """Every tool is right on every model but for those named here. (Edge attribution and faithfulness are refused
by TransformerLens itself where heads share keys and values, and the Jacobian lens where tokens see both ways.)
"""

if __name__ == "__main__":
    warnings.simplefilter("ignore")
    PAGE.write_text(table())
