"""Edges: their scores against slopes of real patches, TransformerLens's split inputs and node attribution; circuits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import PARITY, TINY, hook_count, make, parity
from patching_helpers import direction, everywhere, prompts, run_clean
from torch import Tensor

from tl_looped import LoopedModel
from tl_looped.circuits import EdgeScores, edge_attribution, patch_edges
from tl_looped.circuits import attribution as attribution_of_edges
from tl_looped.circuits.attribution import prepare_edges
from tl_looped.circuits.running import run_edges
from tl_looped.patching import Source, attribution_sweep

LENGTH = 4
TIGHT = {"rtol": 1e-8, "atol": 1e-10}
KINDS: dict[str, dict[str, Any]] = {
    "plain": {"n_prelude": 1, "n_coda": 1, "n_key_value_heads": 2},
    "plain, learned positions": {"norm": "layer", "learned_positions": True, "rotary": None, "gated_mlp": False},
    "a state of zeros": {"state_init": "zeros", "injection": "add"},
    "gated update": {"loop_update": "gated", "gate_rank": 3, "injection": "add"},
    "post": {"norm_placement": "post", "norm": "layer", "final_norm": False},
    "normed each loop": {"loop_norm": "each", "injection": "concat_linear", "n_prelude": 1},
    "residual update": {"loop_update": "residual", "injection": "add"},
    **TINY,
}
PARITIES = sorted(
    path.name
    for path in PARITY.iterdir()
    if path.is_dir() and path.name not in ("hrm-text", "hrm-act", "trm", "parcae", "nanochat")
)


def kind(name: str) -> LoopedModel:
    return make(torch.float64, **KINDS[name])


def pair(model: LoopedModel, n_loops: int | None = 2) -> tuple[Tensor, Any]:
    """(a prompt, the cache of another that differs in one token)."""
    clean, corrupted = prompts(model, batch=2, pos=LENGTH)
    return clean, run_clean(model, corrupted, n_loops)


def scores_of(model: LoopedModel, n_loops: int | None = 2, **options: Any) -> EdgeScores:
    clean, other = pair(model, n_loops)
    clean = options.pop("prompts", clean)
    options = {"source": other, "metric": everywhere(model), "reduce": "mean", "progress": False, **options}
    return edge_attribution(model, clean, n_loops, **options)


def names(rows: tuple[dict[str, Any], ...]) -> list[str]:
    return [row["name"] for row in rows]


# Scores.


@pytest.mark.parametrize("name", KINDS)
def test_a_score_is_the_slope_of_a_real_patch(as_a_user: None, name: str) -> None:
    """Every reader in turn: the slope when its writes move a little towards the other run's, one edge at a time."""
    model = kind(name)
    clean, other = pair(model)
    found = scores_of(model)
    run, given, graph = prepare_edges(model, clean, 2, other, {})
    metric, step = everywhere(model), 1e-4
    edges = graph.possible.nonzero()
    chosen = edges[torch.randperm(len(edges), generator=torch.Generator().manual_seed(0))[:60]]
    for w, r in chosen.tolist():
        kept = torch.ones_like(graph.possible)
        kept[w, r] = False
        values = []
        for share in (step, -step):
            near = Source("near", lambda site, x, share=share: x + share * (given.values(site, x) - x))
            values.append(metric(run_edges(model, run, near, graph, kept)).mean())
        slope = float(values[0] - values[1]) / (2 * step)
        size = float(found.scores[:, r].nan_to_num().abs().max()) + 1e-6
        assert abs(float(found.scores[w, r]) - slope) <= 1e-5 * size + 1e-8, (
            graph.writers[w].name,
            graph.readers[r].name,
        )
    assert hook_count(model) == 0 and not any(weight.grad is not None for weight in model.parameters())
    assert all(weight.requires_grad for weight in model.parameters())


@pytest.mark.parametrize("n_steps", [None, 3])
@pytest.mark.parametrize("name", KINDS)
def test_edges_out_of_a_write_sum_to_its_attribution(name: str, n_steps: int | None) -> None:
    model = kind(name)
    clean, other = pair(model)
    found = scores_of(model, n_steps=n_steps)
    options: dict[str, Any] = {"source": other, "metric": everywhere(model), "reduce": "mean", "n_steps": n_steps}
    sums = dict(zip(names(found.writers), found.scores.nan_to_num().sum(1), strict=True))
    heads = attribution_sweep(model, clean, 2, site="z", axes=("loop", "layer", "head"), progress=False, **options)
    mlps = attribution_sweep(model, clean, 2, site="mlp_out", axes=("loop", "layer"), progress=False, **options)
    for t in range(2):
        for layer in range(2):
            site = f"blocks.{layer}.loop.{t}"
            for head in range(4):
                torch.testing.assert_close(sums[f"{site}.attn.hook_z.{head}"], heads.effect()[t, layer, head], **TIGHT)
            torch.testing.assert_close(sums[f"{site}.hook_mlp_out"], mlps.effect()[t, layer], **TIGHT)
    embed = attribution_sweep(model, clean, 2, site="embed", axes=("pos",), progress=False, **options)
    torch.testing.assert_close(sums["hook_embed"], embed.effect().sum(), **TIGHT)


@pytest.mark.parametrize("name", ["plain", "plain, learned positions", "normed each loop", "residual update", "added"])
def test_one_gradient_for_a_sum_is_that_of_each_write(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    model = kind(name)
    fast = scores_of(model, n_steps=2)
    monkeypatch.setattr(attribution_of_edges, "_is_sum", lambda model: False)
    slow = scores_of(model, n_steps=2)
    monkeypatch.setattr(attribution_of_edges, "_AT_ONCE", 1)
    one_by_one = scores_of(model, n_steps=2)
    for other in (slow, one_by_one):
        torch.testing.assert_close(fast.scores, other.scores, equal_nan=True, **TIGHT)


@pytest.mark.parametrize("gated", [True, False])
def test_scores_and_patches_are_those_of_transformerlens_with_split_inputs(gated: bool) -> None:
    """On the unrolled view, with inputs of its own for every head's q, k and v: all edges, and the sum at a reader."""
    model = make(torch.float64, gated_mlp=gated, n_prelude=1, n_coda=1)
    clean, corrupted = prompts(model, batch=1, pos=LENGTH)
    other, metric = run_clean(model, corrupted), direction(model)
    found = edge_attribution(model, clean, source=other, metric=metric, reduce="mean", progress=False)
    view: Any = model.unrolled(2)
    view.set_use_split_qkv_input(True)
    view.set_use_attn_result(True)
    view.set_use_hook_mlp_in(True)
    seen: list[dict[str, Tensor]] = []

    def keep(x: Tensor, hook: Any) -> Tensor:
        seen[-1][hook.name] = x.clone()  # a tensor of this place alone
        return seen[-1][hook.name]

    values = []
    for tokens in (clean, corrupted):
        seen.append({})
        logits = view.run_with_hooks(tokens, fwd_hooks=[(lambda name: not name.endswith("attn_in"), keep)])
        values.append(metric(logits).sum())
    depth = {call: d for d, call in enumerate(model.cfg.schedule(2).layer_calls())}

    def change(row: dict[str, Any]) -> Tensor:
        block = f"blocks.{depth.get((row['stack'], row['layer'], row['loop']))}."
        name = {"embed": "embed.hook_out", "head": f"{block}attn.hook_result", "mlp": f"{block}mlp.hook_out"}[
            row["kind"]
        ]
        change = seen[1][name] - seen[0][name]
        return (change if row["head"] is None else change[:, :, row["head"]]).detach()

    changes, last = torch.stack([change(row) for row in found.writers]), len(depth) - 1
    metric_of = {(edge["writer"], edge["reader"]): edge["score"] for edge in found.to_dataframe().to_dict("records")}
    for r, row in enumerate(found.readers):
        d = depth.get((row["stack"], row["layer"], row["loop"]), last)
        own = {"mlp": "hook_mlp_in", "logits": "hook_out"}.get(row["kind"], f"attn.hook_{row['kind']}_input")
        name = f"blocks.{d}.{own}"
        grad = torch.autograd.grad(values[0], seen[0][name], retain_graph=True)[0]
        grad = grad if row["head"] is None else grad[:, :, row["head"]]
        wanted = (changes * grad).sum((1, 2, 3))
        there = ~found.scores[:, r].isnan()
        torch.testing.assert_close(found.scores[there, r], wanted[there], **TIGHT)
        whole = {"mlp": "hook_resid_mid", "logits": "hook_out"}.get(row["kind"], "hook_in")
        node = (seen[1][f"blocks.{d}.{whole}"] - seen[0][f"blocks.{d}.{whole}"]) * grad
        torch.testing.assert_close(found.scores[there, r].sum(), node.sum().detach(), **TIGHT)
        if r % 4:
            continue  # a patch takes two runs
        w = int(there.nonzero()[-1 - r % int(there.sum())])
        edge = (found.writers[w]["name"], row["name"])
        assert metric_of[edge] == float(found.scores[w, r])

        def put(x: Tensor, hook: Any, w: int = w, head: int | None = row["head"]) -> Tensor:
            x = x.clone()
            x[(slice(None), slice(None), *([] if head is None else [head]))] += changes[w]
            return x

        patched = metric(view.run_with_hooks(clean, fwd_hooks=[(name, put)]))
        ours = patch_edges(model, clean, source=other, metric=metric, edges=[edge], reduce="mean", progress=False)
        torch.testing.assert_close(ours.values[0], patched.mean(), **TIGHT)


def test_an_edge_into_logits_is_exact_where_these_are_linear() -> None:
    model = make(torch.float64, final_norm=False)
    clean, other = pair(model)
    found = scores_of(model, metric=direction(model)).to_dataframe()
    chosen = found[found["reader"] == "logits"]
    edges = list(zip(chosen["writer"], chosen["reader"], strict=True))
    options: dict[str, Any] = {"source": other, "metric": direction(model), "reduce": "mean", "progress": False}
    real = patch_edges(model, clean, 2, edges=edges, **options)
    assert len(edges) == 21 and real.axis_names == ["edge"] and real.index_df["edge"][0] == "hook_embed -> logits"
    torch.testing.assert_close(torch.tensor(chosen["score"].tolist(), dtype=torch.float64), real.effect(), **TIGHT)
    together = patch_edges(model, clean, 2, edges=[edges], **options)
    torch.testing.assert_close(together.effect()[0], real.effect().sum(), **TIGHT)
    assert float(real.effect().abs().max()) > 0.01


def test_prompts_add_up_and_padding_changes_nothing() -> None:
    model = kind("huginn")
    clean, other = pair(model)
    both = scores_of(model, reduce="scalar", metric=lambda logits: everywhere(model)(logits).sum())
    parts = []
    for row in range(2):
        _, corrupted = prompts(model, pos=LENGTH)
        source = run_clean(model, corrupted[row : row + 1], 2)
        parts.append(scores_of(model, source=source, prompts=clean[row : row + 1]).scores)
    torch.testing.assert_close(both.scores, parts[0] + parts[1], equal_nan=True, **TIGHT)
    torch.testing.assert_close(scores_of(model).scores * 2, both.scores, equal_nan=True, **TIGHT)
    mask = torch.tensor([[0, 1, 1, 1, 1]])
    tokens, _ = prompts(model, batch=1, pos=LENGTH)
    padded = [
        torch.cat([torch.zeros(1, 1, dtype=torch.long), one], 1) for one in (tokens, prompts(model, 1, LENGTH)[1])
    ]
    _, source = model.run_with_cache(padded[1], 2, attention_mask=mask)
    _, bare = model.run_with_cache(prompts(model, 1, LENGTH)[1], 2)
    options: dict[str, Any] = {"metric": direction(model), "reduce": "mean", "progress": False}
    wide = edge_attribution(model, padded[0], 2, source=source, attention_mask=mask, **options)
    short = edge_attribution(model, tokens, 2, source=bare, **options)
    torch.testing.assert_close(wide.scores, short.scores, equal_nan=True, **TIGHT)


# Runs along edges.


@pytest.mark.parametrize("family", PARITIES)
def test_all_edges_are_this_run_and_none_the_other(family: str) -> None:
    model = parity(family, torch.float64)
    clean, corrupted = prompts(model, pos=LENGTH)
    other = run_clean(model, corrupted)
    run, given, graph = prepare_edges(model, clean, None, other, {})
    with torch.no_grad():
        for mask, tokens in ((graph.possible, clean), (torch.zeros_like(graph.possible), corrupted)):
            torch.testing.assert_close(run_edges(model, run, given, graph, mask), model(tokens), rtol=1e-9, atol=1e-9)
    assert hook_count(model) == 0
