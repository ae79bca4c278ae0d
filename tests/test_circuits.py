"""Edges: their scores against slopes of real patches, TransformerLens's split inputs and node attribution; circuits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import PARITY, TINY, TWO_STATES, hook_count, make, parity, tokens_for
from patching_helpers import direction, everywhere, prompts, run_clean
from torch import Tensor

from tl_looped import InputError, LoopedModel
from tl_looped.circuits import Circuit, EdgeScores, Faithfulness, edge_attribution, faithfulness, patch_edges
from tl_looped.circuits import attribution as attribution_of_edges
from tl_looped.circuits.attribution import prepare_edges
from tl_looped.circuits.graph import Graph
from tl_looped.circuits.patching import _random
from tl_looped.circuits.running import run_edges
from tl_looped.patching import Source, attribution_sweep, fixed, mean_source, zero

pytestmark = pytest.mark.filterwarnings("ignore:.*was trained with a prefix")
LENGTH = 4
TIGHT: dict[str, Any] = {"rtol": 1e-8, "atol": 1e-10}
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
TWO_STACKS = {
    "two stacks": TWO_STATES,
    "two stacks, post": {**TWO_STATES, "norm_placement": "post", "attn_gate": False},
}
PARITIES = sorted(
    path.name
    for path in PARITY.iterdir()
    if path.is_dir() and path.name not in ("hrm-act", "trm", "parcae", "nanochat")
)


def kind(name: str) -> LoopedModel:
    return make(torch.float64, **{**KINDS, **TWO_STACKS}[name])


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


@pytest.mark.parametrize("name", [*KINDS, *TWO_STACKS])
def test_a_score_is_the_slope_of_a_real_patch(as_a_user: None, name: str) -> None:
    """Every reader in turn: the slope when its writes move a little towards the other run's, one edge at a time."""
    model = kind(name)
    clean, other = pair(model)
    found = scores_of(model)
    run, given, graph = prepare_edges(model, clean, 2, other, {})
    metric, step = everywhere(model), 1e-4
    edges = graph.possible.nonzero()
    chosen = edges[torch.randperm(len(edges), generator=torch.Generator().manual_seed(0))[:30]]
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
        if r % 8:
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
    measured = scores_of(model, metric=direction(model)).measured(real)
    assert measured.n_edges == 21 and measured.made_by["method"] == "edge patching"
    last = measured.scores[measured.scores.isfinite()]
    torch.testing.assert_close(last, real.effect(), **TIGHT)
    together = patch_edges(model, clean, 2, edges=[edges], **options)
    torch.testing.assert_close(together.effect()[0], real.effect().sum(), **TIGHT)
    assert float(real.effect().abs().max()) > 0.01
    with pytest.raises(InputError, match=r"nothing called .* reads in this run"):
        measured.measured(together)
    each: dict[str, Any] = {**options, "reduce": "none"}
    with pytest.raises(InputError, match=r"one number for an edge: pass reduce='mean'"):
        measured.measured(patch_edges(model, clean, 2, edges=edges[:2], **each))


def test_prompts_add_up_and_padding_changes_nothing() -> None:
    model = kind("huginn")
    clean, corrupted = prompts(model, pos=LENGTH)
    both = scores_of(model, reduce="scalar", metric=lambda logits: everywhere(model)(logits).sum()).scores
    one, two = (
        scores_of(model, source=run_clean(model, corrupted[i : i + 1], 2), prompts=clean[i : i + 1]) for i in (0, 1)
    )
    torch.testing.assert_close(both, one.scores + two.scores, equal_nan=True, **TIGHT)
    torch.testing.assert_close(both, scores_of(model).scores * 2, equal_nan=True, **TIGHT)
    mask = torch.tensor([[0, *[1] * LENGTH]])
    padded, theirs = (torch.cat([torch.zeros(1, 1, dtype=torch.long), one[:1]], 1) for one in (clean, corrupted))
    options: dict[str, Any] = {"metric": direction(model), "reduce": "mean", "progress": False}
    short = edge_attribution(model, clean[:1], 2, source=run_clean(model, corrupted[:1], 2), **options)
    source = run_clean(model, theirs, 2, attention_mask=mask)
    wide = edge_attribution(model, padded, 2, source=source, attention_mask=mask, **options)
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


def test_a_path_is_what_a_reader_makes_of_it_and_no_more() -> None:
    """A circuit of one path: the input to a head to the logits. Its values are those of runs frozen by hand."""
    model = make(torch.float64, n_prelude=1, injection="concat_linear", loop_norm="each")
    clean, other = pair(model)
    edges = [("hook_embed", "blocks.1.loop.0.attn.hook_v.2"), ("blocks.1.loop.0.attn.hook_z.2", "logits")]
    run, given, graph = prepare_edges(model, clean, 2, other, {})
    with torch.no_grad():
        ours = run_edges(model, run, given, graph, graph.mask(edges))
    held = [node.site.name for node in graph.writers]

    def put(values: dict[str, Tensor], *but: str) -> list[Any]:
        names = set(held) - set(but)
        return [(name, lambda x, hook: values[hook.name]) for name in names]

    theirs, kept = other.cache_dict, {}
    here = "blocks.1.loop.0.attn.hook_"
    keep = (f"{here}v", lambda x, hook: kept.update(v=x))
    model.run_with_hooks(clean, 2, fwd_hooks=[*put(theirs, "hook_embed"), keep])  # the input's own way to v

    def one_head(x: Tensor, hook: Any) -> Tensor:
        mixed = theirs[hook.name].clone()
        mixed[:, :, 2] = kept["v"][:, :, 2]
        return mixed

    keep = (f"{here}z", lambda x, hook: kept.update(z=x))
    model.run_with_hooks(clean, 2, fwd_hooks=[*put(theirs, f"{here}z"), (f"{here}v", one_head), keep])
    z = theirs[f"{here}z"].clone()
    z[:, :, 2] = kept["z"][:, :, 2]
    wanted = model.run_with_hooks(clean, 2, fwd_hooks=put({**theirs, f"{here}z": z}))
    torch.testing.assert_close(ours, wanted, **TIGHT)
    assert not torch.allclose(wanted, model(prompts(model, pos=LENGTH)[1], 2))


def test_writes_may_be_replaced_by_zeros_or_means() -> None:
    model = kind("plain")
    clean, _ = pair(model)
    run, given, graph = prepare_edges(model, clean, 2, zero(), {})
    with torch.no_grad():
        none = run_edges(model, run, given, graph, torch.zeros_like(graph.possible))
    assert float(none.abs().max()) == 0  # no bias in this model
    mean = mean_source(model, tokens_for(model, batch=6, pos=LENGTH), 2)
    found = scores_of(model, source=mean)
    assert found.made_by["source"] == "mean" and float(found.scores.nan_to_num().abs().max()) > 0


# Circuits.


def by_paths(circuit: Circuit) -> set[tuple[str, str]]:
    """The edges on paths from an input to the logits, one path after the other."""
    edges, found = circuit.names(), set()

    def group(reader: str) -> list[str]:
        """What writes with what was read."""
        if reader.endswith("mlp.hook_pre"):
            return [reader.replace("mlp.hook_pre", "hook_mlp_out")]
        block, head = reader.rpartition(".attn.")[0], int(reader.rpartition(".")[2])
        heads = [head] if "hook_q" in reader else [2 * head, 2 * head + 1]
        return [f"{block}.attn.hook_z.{one}" for one in heads]

    def walk(writer: str, path: list[tuple[str, str]]) -> None:
        for edge in edges:
            if edge[0] == writer and edge[1] == "logits":
                found.update([*path, edge])
            elif edge[0] == writer:
                for one in group(edge[1]):
                    walk(one, [*path, edge])

    walk("hook_embed", [])
    return found


@pytest.mark.parametrize("n", [4, 12, 25, 40])
def test_what_lies_on_no_path_is_pruned(n: int) -> None:
    model = kind("plain")  # two query heads share a key head
    graph = Graph.of(model, 2, has_state=False)
    draw = torch.rand(graph.possible.shape, generator=torch.Generator().manual_seed(n), dtype=torch.float64)
    draw[0, -1] += 1  # the one path that is there for sure
    scores = EdgeScores({}, **graph.rows(), scores=draw.masked_fill(~graph.possible, torch.nan), metric=0.0)
    pruned = scores.top(n)
    largest = scores.scores.nan_to_num(-1).flatten().topk(n).values[-1]
    everything = Circuit({}, **graph.rows(), edges=scores.scores >= largest, scores=scores.scores)
    assert everything.n_edges == n and set(pruned.names()) == by_paths(everything)
    assert scores.threshold(float(largest)).names() == pruned.names()


def test_random_circuits_are_as_large_and_all_on_paths() -> None:
    graph = Graph.of(kind("plain"), 2, has_state=False)
    for n in (1, 10, 60, int(graph.possible.sum())):
        drawn = [_random(graph, n, torch.Generator().manual_seed(seed)) for seed in (0, 0, 1)]
        assert torch.equal(drawn[0], drawn[1]) and int(drawn[0].sum()) >= n
        assert torch.equal(graph.prune(drawn[2]), drawn[2]) and not bool((drawn[2] & ~graph.possible).any())
    assert int(drawn[0].sum()) == n and int(_random(graph, 10, torch.Generator()).sum()) < 40


def test_a_physical_edge_is_told_with_its_loops() -> None:
    model = make(n_loops=4)
    z, q = "blocks.1.loop.{}.attn.hook_z.0", "blocks.0.loop.{}.attn.hook_q.3"
    edges = [(z.format(t), q.format(t + 1)) for t in (0, 2)]
    edges += [(z.format(0), q.format(2)), ("hook_embed", q.format(1)), ("hook_embed", q.format(3))]
    edges += [("blocks.1.loop.3.hook_mlp_out", "logits")]
    table = Circuit.of(model, edges).tied().astype(object)
    found = {(row.writer, row.reader, row.loops_apart): (row.n, row.loops) for row in table.itertuples()}
    plain = ("blocks.1.attn.hook_z.0", "blocks.0.attn.hook_q.3")
    assert found[(*plain, 1)] == (2, [1, 3]) and found[(*plain, 2)] == (1, [2])
    rest = {key[0]: value for key, value in found.items() if key[:2] != plain}
    assert rest == {"hook_embed": (2, [1, 3]), "blocks.1.hook_mlp_out": (1, [3])}


def test_faithfulness_is_the_share_of_the_effect_and_comes_with_a_null(tmp_path: Path) -> None:
    model = make(torch.float64, final_norm=False, n_loops=2)
    clean, other = pair(model)
    found = scores_of(model, metric=direction(model))
    options: dict[str, Any] = {"source": other, "metric": direction(model), "reduce": "mean", "progress": False}
    circuits = [found.top(40), Circuit.of(model, [("hook_embed", "logits")]), found.top(found.n_edges)]
    curve = faithfulness(model, clean, circuits=circuits, draws=3, draw_seed=5, **options)
    assert curve.n_edges.tolist() == [circuits[0].n_edges, 1, found.n_edges] and curve.random.shape == (3, 3)
    torch.testing.assert_close(curve.faithfulness[2], torch.ones(()).double(), **TIGHT)
    torch.testing.assert_close(curve.completeness[2], torch.zeros(()).double(), **TIGHT)
    whole, none = curve.metric
    assert whole == pytest.approx(found.metric) and none != pytest.approx(whole)
    direct = patch_edges(model, clean, edges=[("hook_embed", "logits")], **options).effect()[0]
    torch.testing.assert_close(curve.faithfulness[1] * (whole - none), -direct, **TIGHT)  # linear: what it adds
    assert bool((curve.random_edges >= curve.n_edges[:, None]).all())
    again = faithfulness(model, clean, circuits=circuits[0], draws=3, draw_seed=5, **options)
    assert torch.equal(again.random[0], curve.random[0]) and again.made_by["draw_seed"] == 5
    assert list(curve.to_dataframe()) == ["n_edges", "faithfulness", "completeness", "random_mean", "random_largest"]
    for one in (curve, found, circuits[0]):
        loaded: Any = type(one).load(one.save(tmp_path / "one"))
        assert loaded.to_dataframe().equals(one.to_dataframe()) and loaded.made_by == one.made_by
        assert "svg" in loaded.plot().still_svg()
    assert isinstance(curve, Faithfulness)


def test_in_looped_hops_scores_go_with_patches_and_queries_read_the_loop_before() -> None:
    model = LoopedModel.from_pretrained("looped-hops")
    context, right, wrong = "a=4; c=a; b=7; d=c; f=b; g=f; ? ", model.to_single_token("4"), model.to_single_token("7")
    _, other = model.run_with_cache(context + "g", 3)
    options: dict[str, Any] = {
        "source": other,
        "metric": lambda x: x[0, -1, right] - x[0, -1, wrong],
        "progress": False,
    }
    scores = edge_attribution(model, context + "d", 3, n_steps=5, **options)
    edges = scores.to_dataframe()
    names = list(zip(edges["writer"], edges["reader"], strict=True))[::6]
    layer, heads = "blocks.1.loop.{}.attn.hook_{}.{}", (0, 1)
    hops = [[(layer.format(t, "z", i), layer.format(t + 1, "q", j)) for i in heads for j in heads] for t in heads]
    real = patch_edges(model, context + "d", 3, edges=[*hops, *names], **options).effect()
    estimate = torch.tensor([float(one) for one in edges["score"][::6]])
    assert float(torch.corrcoef(torch.stack([estimate, real[2:]]))[0, 1]) > 0.5
    assert float(real[:2].max()) < -5 and float(real[2:].abs().median()) < 0.01


# What is refused.


def test_wrong_input_is_told_before_any_run(as_a_user: None) -> None:
    model = make()
    clean, other = pair(model)
    options: dict[str, Any] = {"source": other, "metric": direction(model), "reduce": "mean", "progress": False}
    back = ("blocks.1.loop.1.attn.hook_z.0", "blocks.1.loop.0.attn.hook_q.0")
    with pytest.raises(InputError, match=r"hook_z.0' is written after .*hook_q.0' has read: an edge runs forward"):
        patch_edges(model, clean, edges=[back], **options)
    same = ("blocks.1.loop.0.attn.hook_z.0", "blocks.1.loop.0.attn.hook_v.0")
    with pytest.raises(InputError, match="an edge runs forward in time"):
        Circuit.of(model, [same], 2)
    with pytest.raises(InputError, match=r"nothing called 'blocks.0.loop.0.attn.hook_z.9' writes.*Nearest"):
        Circuit.of(model, [("blocks.0.loop.0.attn.hook_z.9", "logits")])
    with pytest.raises(InputError, match=r"nothing called 'hook_embed' reads"):
        Circuit.of(model, [("hook_embed", "hook_embed")])
    for wrong in (("hook_embed", "logits"), [[("hook_embed", "logits", "logits")]]):
        with pytest.raises(InputError, match="an edge is a pair of names"):
            patch_edges(model, clean, edges=wrong, **options)  # pyright: ignore[reportArgumentType]
    for empty in ([], [[]]):
        with pytest.raises(InputError, match="name at least one, as"):
            patch_edges(model, clean, edges=empty, **options)
    with pytest.raises(InputError, match="no edges are given"):
        Circuit.of(model, [])
    graph = Graph.of(model, 2, has_state=False)
    bare = Circuit({}, **graph.rows(), edges=torch.zeros_like(graph.possible), scores=torch.zeros(graph.possible.shape))
    with pytest.raises(InputError, match="the circuit has no edges"):
        faithfulness(model, clean, circuits=bare, **options)
    with pytest.raises(InputError, match="circuits is empty"):
        faithfulness(model, clean, circuits=[], **options)
    with pytest.raises(InputError, match=r"pass the n_loops, initial_state and model that it comes from"):
        faithfulness(model, clean, circuits=Circuit.of(model, [("hook_embed", "logits")], 3), **options)
    with pytest.raises(InputError, match=r"no path from an input to the logits is among the 1 edges of top\(1\)"):
        scores_of(model).top(1)
    assert hook_count(model) == 0


def test_a_run_that_can_not_be_scored_is_refused() -> None:
    model = make()
    clean, other = pair(model)
    longer = run_clean(model, tokens_for(model, batch=2, pos=LENGTH + 1), 2)
    with pytest.raises(InputError, match="source and patched prompts differ"):
        scores_of(model, source=longer)
    with pytest.raises(InputError, match=r"the source ran 3 loops, this call 2"):
        scores_of(model, source=run_clean(model, clean, 3))
    with pytest.raises(InputError, match="the source's cache has no"):
        scores_of(model, source=model.run_with_cache(clean, 2, names_filter="hook_embed")[1])
    with torch.inference_mode(), pytest.raises(InputError, match=r"call it outside torch.inference_mode"):
        scores_of(model, source=other)
    for flat in (lambda logits: logits.argmax(-1).float().sum(-1), lambda logits: logits.detach().sum((1, 2))):
        with pytest.raises(InputError, match="the metric does not depend on the logits in a way"):
            scores_of(model, metric=flat)
    with pytest.raises(InputError, match=r"gives one number for all prompts: pass reduce='mean'"):
        scores_of(model, reduce="none")
    with pytest.raises(InputError, match="n_steps integrates from the corrupted prompt"):
        scores_of(model, source=fixed(torch.zeros(())), n_steps=2)
    with pytest.raises(InputError, match="the metric is 0 with all edges and with none"):
        options: dict[str, Any] = {"source": other, "reduce": "mean", "progress": False}
        circuit = Circuit.of(model, [("hook_embed", "logits")])
        faithfulness(model, clean, circuits=circuit, metric=lambda logits: logits.sum((1, 2)) * 0, **options)
    with pytest.raises(InputError, match=r"by value embeddings, which are no edge: patch nodes instead"):
        scores_of(parity("parcae"), n_loops=None, source=zero())
