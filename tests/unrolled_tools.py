"""TransformerLens's tools on the realised-depth view: each runs on any bridge, and some are done again by hand.

`python tests/unrolled_tools.py` writes the table of docs/unrolled-tools.md; test_unrolled_tools.py checks it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from helpers import TINY, make, word_tokenizer
from torch import Tensor
from transformer_lens import ActivationCache, SVDInterpreter, patching
from transformer_lens.head_detector import detect_head
from transformer_lens.model_bridge import TransformerBridge
from transformer_lens.model_bridge.sources._bridge_builder import build_bridge_from_module
from transformer_lens.tools import analysis
from transformer_lens.tools.analysis.attribution_patching import EdgeAttributionConfig, attribution_patch, faithfulness
from transformer_lens.tools.analysis.projection_kernel import attention_head_subspace_affinity
from transformers import LlamaConfig, LlamaForCausalLM

from tl_looped import LoopedModel
from tl_looped.engine.schedule import CORE
from tl_looped.unrolled import UnrolledModel

LOOPS = 2
# Without injection and loop norms the sum holds; with one loop Ouro's does too, though not by head.
FORMS: dict[str, tuple[dict[str, Any], int]] = {
    "feedforward but for its loops": ({"n_prelude": 1, "n_core": 1, "n_coda": 1}, LOOPS),
    "Ouro, one loop": (TINY["ouro"], 1),
    "Ouro": (TINY["ouro"], LOOPS),
    "Huginn": ({**TINY["huginn"], "n_core": 1}, LOOPS),
    "retrofitted Llama": ({**TINY["llama"], "n_core": 1}, LOOPS),
    "retrofitted OLMo-2": ({**TINY["olmo2"], "n_core": 1}, LOOPS),
    "prelude added in every loop": ({**TINY["added"], "n_core": 1}, LOOPS),
}
PLAIN = next(iter(FORMS))
CLEAN, CORRUPTED = torch.tensor([[2, 5, 7], [4, 2, 9]]), torch.tensor([[2, 8, 7], [4, 6, 9]])
TEXT = "a b c a b"


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


@lru_cache
def looped(form: str) -> LoopedModel:
    """The model of a form."""
    return make(tokenizer=word_tokenizer(), **FORMS[form][0])


@lru_cache
def view(form: str, folded: bool = False) -> UnrolledModel:
    """Its view."""
    made = looped(form).unrolled(FORMS[form][1])
    if folded:
        made.enable_compatibility_mode()
    return made


@lru_cache
def plain_bridge(folded: bool = False) -> TransformerBridge:
    """What the view of `PLAIN` has to equal."""
    return llama_bridge(looped(PLAIN), LOOPS, folded)


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


def outcome(tool: Tool, form: str) -> str:
    """Run a tool on the view of a form, and say "right" or what refused; a wrong number is an error."""
    model, n_loops = looped(form), FORMS[form][1]
    try:
        found = tool.run(view(form, tool.folded))
    except (ValueError, NotImplementedError) as error:
        return f"refuses: {error}"
    wanted = []
    if form == PLAIN and tool.as_bridge:
        wanted.append(tool.run(plain_bridge(tool.folded)))
    if tool.by_hand is not None:
        wanted.append(tool.by_hand(model, n_loops))
    if not wanted:
        raise AssertionError(f"neither refused on {form!r} nor known to be right there")
    for one in wanted:
        torch.testing.assert_close(found.detach(), one.detach(), rtol=1e-3, atol=2e-5)
    return "right"


# The tools.


def cache_of(model: Any, tokens: Tensor = CLEAN) -> ActivationCache:
    """The cache of a bridge."""
    with torch.no_grad():
        return model.run_with_cache(tokens)[1]


def metric(logits: Tensor) -> Tensor:
    """What is patched for."""
    return logits[:, -1, 3].sum()


def site(model: LoopedModel, n_loops: int, depth: int, component: str) -> str:
    """The looped model's name of a site of a layer of the view."""
    stack, layer, loop = model.cfg.schedule(n_loops).at_depth(depth)
    return f"{stack}.{layer}.loop.{loop}.{component}" if stack == CORE else f"{stack}.{layer}.{component}"


def activations(model: LoopedModel, n_loops: int, component: str, tokens: Tensor = CLEAN) -> list[Tensor]:
    """A site of every layer call."""
    with torch.no_grad():
        cache = model.run_with_cache(tokens, n_loops, names_filter=lambda name: True)[1].cache_dict
    return [cache[site(model, n_loops, depth, component)] for depth in range(model.cfg.schedule(n_loops).depth)]


def embedded(model: LoopedModel, tokens: Tensor = CLEAN) -> Tensor:
    """What the embedding writes."""
    return model.W_E[tokens] * model.cfg.embed_scale


def states(model: LoopedModel, n_loops: int) -> Tensor:
    """The residual stream before, in the middle of and after every layer."""
    before, middle = (activations(model, n_loops, f"hook_resid_{where}") for where in ("pre", "mid"))
    last = activations(model, n_loops, "hook_resid_post")[-1]
    return torch.stack([x for pair in zip(before, middle, strict=True) for x in pair] + [last])


def writes(model: LoopedModel, n_loops: int) -> Tensor:
    """What the embedding and every layer add."""
    both = zip(*(activations(model, n_loops, f"hook_{part}_out") for part in ("attn", "mlp")), strict=True)
    return torch.stack([embedded(model), *(x for pair in both for x in pair)])


def lens(model: LoopedModel, n_loops: int) -> Tensor:
    """Every state through the norm before the head."""
    norm = model.transformer.ln_final
    return model.transformer.unembed(norm(states(model, n_loops)))


def patched(component: str, head: bool = False) -> Callable[[LoopedModel, int], Tensor]:
    """The metric with one site of one layer (one position, or head) from the clean run."""

    def sweep(model: LoopedModel, n_loops: int) -> Tensor:
        rows = []
        for depth, clean in enumerate(activations(model, n_loops, component)):
            for place in range(clean.shape[2 if head else 1]):

                def write(x: Tensor, hook: Any, clean: Tensor = clean, place: int = place) -> Tensor:
                    x = x.clone()
                    where = (slice(None), slice(None), place) if head else (slice(None), place)
                    x[where] = clean[where]
                    return x

                name = site(model, n_loops, depth, component)
                rows.append(metric(model.run_with_hooks(CORRUPTED, n_loops, fwd_hooks=[(name, write)])))
        return torch.stack(rows).unflatten(0, (model.cfg.schedule(n_loops).depth, -1))

    return torch.no_grad()(sweep)


def act_patch(name: str) -> Callable[[Any], Tensor]:
    """One of `transformer_lens.patching`."""
    function = getattr(patching, f"get_act_patch_{name}")
    return torch.no_grad()(lambda model: function(model, CORRUPTED, cache_of(model), metric))


def direct_path(model: Any) -> Tensor:
    """From the first layer's head 1 into all queries behind it."""
    caches = cache_of(model), cache_of(model, CORRUPTED)
    with torch.no_grad():
        return patching.get_act_patch_direct_path(model, CORRUPTED, *caches, metric, 0, 1, "q")


def edges(model: Any) -> Tensor:
    """Scores of all edges."""
    config = EdgeAttributionConfig(granularity="edge")
    return torch.tensor(list(attribution_patch(model, CLEAN, CORRUPTED, metric, config).edge_scores.values()))


def recovered(model: Any) -> Tensor:
    """How much the 20 largest edges recover."""
    result = attribution_patch(model, CLEAN[:1], CORRUPTED[:1], metric, EdgeAttributionConfig(granularity="edge"))
    return torch.tensor(faithfulness(model, CLEAN[:1], CORRUPTED[:1], metric, result.top_edges(k=20)).recovered)


def node_scores(model: LoopedModel, n_loops: int) -> Tensor:
    """(clean − corrupted) · gradient for the embedding, every head's z and every MLP, averaged over prompts."""
    depth, grads = model.cfg.schedule(n_loops).depth, {}
    names = ["hook_embed"]
    for d in range(depth):
        names += [site(model, n_loops, d, "attn.hook_z"), site(model, n_loops, d, "hook_mlp_out")]
    keep = [(name, lambda grad, hook: grads.__setitem__(hook.name, grad)) for name in names]
    with model.hooks(bwd_hooks=keep):
        metric(model(CORRUPTED, n_loops)).backward()
    model.zero_grad()
    with torch.no_grad():
        clean, corrupted = (model.run_with_cache(t, n_loops, names_filter=names)[1] for t in (CLEAN, CORRUPTED))
    # By position, and for z by position and head.
    scores = [((clean[name] - corrupted[name]) * grads[name]).sum(-1).flatten(1).mean(0) for name in names]
    return torch.cat(scores)


def by_node(model: Any) -> Tensor:
    """The same from TransformerLens: the embedding's positions, then each layer's heads and MLP by position."""
    result = attribution_patch(model, CLEAN, CORRUPTED, metric).node_scores
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
    tokens = CLEAN[:1]
    for _ in range(2):
        tokens = torch.cat([tokens, model(tokens, n_loops)[:, -1].argmax(-1)[:, None]], dim=1)
    return tokens


def generated(model: Any) -> Tensor:
    """The same from TransformerLens."""
    options = {"do_sample": False, "return_type": "tokens", "verbose": False, "stop_at_eos": False}
    return model.generate(CLEAN[:1], max_new_tokens=2, **options)


def continued(layer: int) -> Callable[[Any], Tensor]:
    """Logits, going on from the residual stream at a layer; -2: the first layer of the last loop."""
    return torch.no_grad()(lambda model: model(cache_of(model)["resid_pre", layer], start_at_layer=layer))


def stopped(model: Any) -> Tensor:
    """The residual stream before layer 2."""
    with torch.no_grad():
        return model(CLEAN, stop_at_layer=1)


def total(model: Any) -> Tensor:
    """Direct logit attribution of heads."""
    return analysis.direct_logit_attribution(model, CLEAN, 3, unit="head").attribution


def attributed(model: Any) -> Tensor:
    """What the parts of the residual stream say to a token."""
    cache = cache_of(model)
    return cache.logit_attrs(cache.decompose_resid(), 3)


def run(model: LoopedModel, n_loops: int) -> Tensor:
    """Logits."""
    return model(CLEAN, n_loops)


TOOLS: dict[str, Tool] = {
    "forward": Tool(lambda model: model(CLEAN), run),
    "loss": Tool(lambda model: model(CLEAN, return_type="loss"), lambda m, n: m(CLEAN, n, return_type="loss")),
    "generate": Tool(generated, greedy),
    "forward(stop_at_layer)": Tool(stopped, lambda m, n: activations(m, n, "hook_resid_pre")[1]),
    "forward(start_at_layer) in the first loop": Tool(continued(0), run),
    "enable_compatibility_mode": Tool(
        lambda model: model(CLEAN).log_softmax(-1), lambda m, n: run(m, n).log_softmax(-1), folded=True
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
    "logit_lens": Tool(lambda m: analysis.logit_lens(m, CLEAN, incl_mid=True, positions=None).values, lens),
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
    head = ["tool", *FORMS]
    rows = [[f"`{name}`" if name.isidentifier() or "." in name else name] for name in TOOLS]
    for row, tool in zip(rows, TOOLS.values(), strict=True):
        row += [outcome(tool, form).split(":")[0] for form in FORMS]
    lines = [head, ["---"] * len(head), *rows]
    return _INTRODUCTION + "\n" + "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


PAGE = Path(__file__).parents[1] / "docs" / "unrolled-tools.md"
_INTRODUCTION = """# TransformerLens's tools on a looped model

`model.unrolled(n_loops)` is a TransformerBridge of all layer calls in a row, on the looped model's own Parameters. A
tool is *right* there where its numbers are those of a bridge of transformers' Llama with copied weights, and those of
the looped model's own calls; what would be wrong *refuses*, with the reason and what to call instead. This page
is written by `python tests/unrolled_tools.py` and checked by the tests. (TransformerLens's `get_act_patch_resid_mid`
on its own bridges writes to the MLP's input only; here it writes to the residual stream.)

What the view does not do: its hooks do not act in the looped model, nor the other way round; loop count and initial
state are those it was made with; attention is always explicit. A hook's loop is `view.names.loop(hook.name)`.
"""

if __name__ == "__main__":
    PAGE.write_text(table())
