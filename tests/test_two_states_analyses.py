"""Analyses of a model in which two stacks loop: what takes the stack, what needs none, and what refuses."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from analyses import analyses, call
from helpers import PARITY, TWO_STATES, make, noise_like, tokens_for, word_tokenizer
from torch import Tensor

from tl_looped import InputError, LoopedCache, LoopedModel, TwoStates
from tl_looped.attention import attention_bound, attention_stability
from tl_looped.attention.stability import pattern_distances_of
from tl_looped.dynamics import (
    STEP,
    convergence,
    cycle,
    jacobian_spectrum,
    limit_behaviour,
    long_run,
    path_independence,
    similarity,
    state_motion,
    trajectory,
)
from tl_looped.dynamics.verdicts import judge_states, sketch
from tl_looped.lens import fit_tuned_lens, logit_lens, readout_agreement, trace_exits
from tl_looped.lens.measures import ENTROPY
from tl_looped.observe import Measure, observe
from tl_looped.patching import (
    Receiver,
    Sender,
    attribution_sweep,
    freeze_patterns,
    patch_sweep,
    path_patch,
    skip_layer,
    skip_loop,
)
from tl_looped.patching.sources import Source
from tl_looped.record import directions, record, steering_sweep
from tl_looped.report import Prompt, collect, report_page
from tl_looped.report.analyses import loop_analyses
from tl_looped.report.readouts import readout_sections
from tl_looped.stages import STAGE_MEASURES, ablation_effect, massive_activations, neuron_shares
from tl_looped.stages.neurons import logit_effects

pytestmark = pytest.mark.filterwarnings("ignore:.*was trained with a prefix")
STACKS = pytest.mark.parametrize("stack", ["L_blocks", "H_blocks"])


@pytest.fixture(scope="module")
def model() -> LoopedModel:
    """A tiny model: two layers in each stack, H 2, L 2."""
    return make(torch.float64, **TWO_STATES)


@pytest.fixture(scope="module")
def tokens(model: LoopedModel) -> Tensor:
    return tokens_for(model, batch=1)


@pytest.fixture(scope="module")
def cache(model: LoopedModel, tokens: Tensor) -> LoopedCache:
    with torch.no_grad():
        return model.run_with_cache(tokens, (3, 2))[1]


# Lenses: what the head reads is the state of H_blocks.


def test_the_exact_lens_is_runs_of_fewer_loops(model: LoopedModel, tokens: Tensor):
    found = logit_lens(model, tokens, (3, 2), positions=None)
    assert found.loops == (0, 1, 2) and found.made_by["stack"] == "H_blocks"
    for t in range(3):
        stopped = model(tokens, (t + 1, 2)).detach().log_softmax(-1)
        torch.testing.assert_close(found.top_probs[t], stopped.exp().topk(5).values)
    last = logit_lens(model, tokens, (3, 2), positions=None, site="resid_post", layers=[-1])
    torch.testing.assert_close(last.top_probs[:, 0], found.top_probs)  # but for the norm that closes the loop


def test_the_other_stack_has_the_direct_lens(model: LoopedModel, tokens: Tensor, cache: LoopedCache):
    found = logit_lens(model, tokens, (3, 2), kind="direct", stack="L_blocks", positions=None, loops=[1, -1])
    said = (cache.stack("L_blocks.state_post")[[1, 5]] @ model.W_U.detach()).softmax(-1)
    torch.testing.assert_close(found.top_probs, said.topk(5).values)
    with pytest.raises(
        InputError, match="reads the state of H_blocks, so that of L_blocks has no exact read-out: pass"
    ):
        logit_lens(model, tokens, stack="L_blocks")
    with pytest.raises(InputError, match="what loops in custom is L_blocks and H_blocks: pass stack=.*got 'blocks'"):
        logit_lens(model, tokens, stack="blocks")


@STACKS
def test_a_tuned_lens_is_of_one_stack(model: LoopedModel, stack: str):
    prompts = tokens_for(model, batch=5, pos=4)
    options: dict[str, Any] = {"site": "state", "stack": stack, "per_loop": True}
    fitted = fit_tuned_lens(model, prompts, (2, 3), **options, steps=2, progress=False)
    assert len(fitted.weight) == (6 if stack == "L_blocks" else 2)
    found = logit_lens(model, prompts, (2, 3), kind="tuned", stack=stack, translator=fitted, positions=None)
    torch.testing.assert_close(found.kl_to_final[:, 4].mean(-1), fitted.held_out_tuned_loss[:, 0].to(found.entropy))
    with pytest.raises(
        InputError, match=r"fitted on runs of \(2, 3\) loops, this one has \(3, 2\): pass n_loops=\(2, 3\)"
    ):
        logit_lens(model, prompts, (3, 2), kind="tuned", stack=stack, translator=fitted)
    other = {"L_blocks": "H_blocks", "H_blocks": "L_blocks"}[stack]
    with pytest.raises(InputError, match=f"the translator reads {stack}, not {other}: pass stack='{stack}'"):
        logit_lens(model, prompts, (2, 3), kind="tuned", stack=other, translator=fitted)


def test_exits_and_agreement_are_of_the_runs_loops(model: LoopedModel, tokens: Tensor):
    assert readout_agreement(model, tokens, (3, 2)).loops == (0, 1, 2)
    trace = trace_exits(model, tokens, (3, 2))
    last = model(tokens, (3, 2)).detach().log_softmax(-1)
    first = model(tokens, (1, 2)).detach().log_softmax(-1)
    torch.testing.assert_close(trace.kl_to_final[0], (last.exp() * (last - first)).sum(-1)[0])


# Observation.


@STACKS
def test_what_layers_have_is_read_by_stack(model: LoopedModel, tokens: Tensor, cache: LoopedCache, stack: str):
    seen = observe(model, tokens, (3, 2), measures=[STEP], progress=False)
    x = cache.stack(f"{stack}.resid_post")[:, :, 0]
    steps = ((x[1:] - x[:-1]).norm(dim=-1) / x[1:].norm(dim=-1)).mean(-1)
    found = seen.by_loop("step", stack)
    assert found.shape == (6 if stack == "L_blocks" else 3, 2)
    torch.testing.assert_close(found[1:], steps)
    table = seen.to_dataframe()
    last = table[(table["stack"] == stack) & (table["layer"] == 1)]["value"].tolist()[-1]
    assert last == pytest.approx(float(steps[-1, 1]))
    assert all(seen.plot(group=group).data for group in ("depth", "loop", "layer"))
    with pytest.raises(InputError, match="what loops is L_blocks and H_blocks: pass stack='L_blocks' or 'H_blocks'"):
        seen.by_loop("step")


def test_states_are_measured_by_stack_and_readouts_by_loop(model: LoopedModel, tokens: Tensor, cache: LoopedCache):
    size = [Measure(f"size {s}", "‖z‖", "", f"{s}_blocks.state_post", _size, axes=("pos",)) for s in "LH"]
    to_end = Measure("to end", "", "", "L_blocks.state_post", lambda x, end: (x - end).norm(dim=-1), "last", ("pos",))
    seen = observe(model, tokens, (3, 2), measures=[*size, ENTROPY, to_end], progress=False)
    for s in "LH":
        torch.testing.assert_close(
            seen.by_loop(f"size {s}"), cache.stack(f"{s}_blocks.state_post").norm(dim=-1).mean((1, 2))
        )
    assert seen.by_loop("entropy").shape == (3,)
    assert float(seen.by_loop("to end")[-1]) == 0 and float(seen.by_loop("to end")[-2]) > 0
    assert set(seen.to_dataframe("size L")["stack"]) == {"L_blocks"}
    assert seen.plot("size L").data and seen.plot("entropy").data
    with pytest.raises(InputError, match="reads 'state_post': 'state_post' is at two places in custom"):
        observe(model, tokens, measures=[Measure("size", "", "", "state_post", _size, axes=("pos",))])


def _size(x: Tensor) -> Tensor:
    return x.norm(dim=-1)


def test_another_prefix_is_another_observation(model: LoopedModel, tokens: Tensor, tmp_path: Path):
    """Of a row that is not the first."""
    prompts = tokens_for(model, batch=2)
    options: dict[str, Any] = {"measures": [STEP], "save_to": tmp_path / "seen.safetensors", "progress": False}
    observe(model, prompts, prefix_length=[2, 2], **options)
    with pytest.raises(InputError, match="was made by another call"):
        observe(model, prompts, prefix_length=[2, 3], **options)


# Patching.


def total(logits: Tensor) -> Tensor:
    """A metric of every prompt."""
    return (logits * noise_like(logits[0])).sum((-2, -1))


def summed(logits: Tensor) -> Tensor:
    """The same of all prompts."""
    return total(logits).sum()


@pytest.mark.parametrize(
    ("site", "axes", "when"),
    [
        ("state", ("loop", "pos"), "at"),
        ("resid_pre", ("loop", "layer"), "at"),
        ("z", ("loop", "head"), "from"),
        ("attn.gate", ("layer",), "every"),
    ],
)
@STACKS
def test_every_cell_of_a_sweep_is_a_run_with_a_hook(
    model: LoopedModel, tokens: Tensor, stack: str, site: str, axes: tuple[Any, ...], when: Any
):
    other = tokens_for(model, batch=1, seed=8)
    with torch.no_grad():
        source = model.run_with_cache(other, (2, 2))[1]
        found = patch_sweep(
            model, tokens, (2, 2), source=source, metric=total, site=site, axes=axes, when=when, stack=stack,
            reduce="none", progress=False,
        )  # fmt: skip
        loops = model.cfg.schedule((2, 2)).n_loops(stack)
        for cell, value in zip(found.to_dataframe().to_dict("records"), found.values.flatten(), strict=True):

            def write(x: Tensor, hook: Any) -> Tensor:
                given, at = source[hook.name], cell
                mask = torch.ones_like(x, dtype=torch.bool)
                for axis, dim in (("pos", 1), ("head", 2)):
                    if axis in at:
                        kept = torch.arange(x.shape[dim]) == at[axis]
                        mask = mask & kept.view([-1 if i == dim else 1 for i in range(x.ndim)])
                return torch.where(mask, given, x)

            which = {"at": [cell.get("loop")], "every": range(loops), "from": range(cell.get("loop", 0), loops)}[when]
            layers = [cell["layer"]] if "layer" in axes else [None] if site == "state" else range(2)
            names = [
                f"{stack}.loop.{t}.hook_state_pre" if i is None else f"{stack}.{i}.loop.{t}.{_full(site)}"
                for t in which
                for i in layers
            ]
            plain = total(model.run_with_hooks(tokens, (2, 2), fwd_hooks=[(name, write) for name in names]))
            torch.testing.assert_close(value, plain[0])


def _full(site: str) -> str:
    return {"resid_pre": "hook_resid_pre", "z": "attn.hook_z", "attn.gate": "attn.hook_gate"}[site]


def test_what_fires_once_is_patched_without_a_stack(model: LoopedModel, tokens: Tensor):
    source = model.run_with_cache(tokens_for(model, batch=1, seed=8))[1]
    found = patch_sweep(model, tokens, source=source, metric=summed, site="embed", axes=("pos",), progress=False)
    assert found.values.shape == (5,)
    with pytest.raises(InputError, match="site 'embed' belongs to no stack that loops: leave out stack='L_blocks'"):
        patch_sweep(model, tokens, source=source, metric=total, site="embed", axes=("pos",), stack="L_blocks")
    with pytest.raises(InputError, match="what loops in custom is L_blocks and H_blocks: pass stack="):
        patch_sweep(model, tokens, source=source, metric=total)
    with pytest.raises(InputError, match=r"the source ran \(2, 2\) loops, this call \(2, 3\): pass n_loops=\(2, 2\)"):
        patch_sweep(model, tokens, (2, 3), source=source, metric=total, stack="L_blocks")


@STACKS
def test_attribution_predicts_small_patches(model: LoopedModel, tokens: Tensor, stack: str):
    step = 1e-6
    source = Source("nudge", lambda site, x: x + step * noise_like(x[:1]), constant=False)
    options: dict[str, Any] = {
        "source": source,
        "metric": total,
        "axes": ("loop", "layer"),
        "stack": stack,
        "reduce": "none",
    }
    predicted = attribution_sweep(model, tokens, **options, progress=False).effect()
    measured = patch_sweep(model, tokens, **options, progress=False).effect()
    torch.testing.assert_close(predicted, measured, rtol=1e-3, atol=1e-9)


def test_interventions_take_the_stack(model: LoopedModel, tokens: Tensor):
    with torch.no_grad():
        plain, cache = model.run_with_cache(tokens)
        hooks = skip_loop(model, 1, stack="H_blocks")
        first = model(tokens, 1)
        torch.testing.assert_close(model.run_with_hooks(tokens, fwd_hooks=hooks), first)
        for hooks in (skip_loop(model, 0, stack="L_blocks"), skip_layer(model, 1, 2, stack="L_blocks")):
            assert not torch.allclose(model.run_with_hooks(tokens, fwd_hooks=hooks), plain)
        model.run_with_hooks(
            tokens,
            fwd_hooks=[
                *freeze_patterns(model, 1, stack="L_blocks"),
                ("L_blocks.0.loop.3.attn.hook_pattern", lambda x, hook: _same(x, cache["L_blocks.pattern", 0, 1])),
            ],
        )
    with pytest.raises(InputError, match="what loops in custom is L_blocks and H_blocks: pass stack="):
        skip_loop(model, 0)


def _same(x: Tensor, other: Tensor) -> None:
    assert torch.equal(x, other)


# Dynamics and attention.


@STACKS
def test_dynamics_are_of_one_stack(model: LoopedModel, tokens: Tensor, cache: LoopedCache, stack: str):
    loops = 6 if stack == "L_blocks" else 3
    x = cache.stack(f"{stack}.resid_post")[:, :, 0]
    judged = convergence(model, tokens, (3, 2), stack=stack, progress=False)
    torch.testing.assert_close(judged.distances, (x - x[-1]).norm(dim=-1) / x[-1].norm(dim=-1))
    flat = x.flatten(0, 1)
    cosines = torch.nn.functional.cosine_similarity(flat[:, None], flat[None], dim=-1).mean(-1)
    torch.testing.assert_close(similarity(model, tokens, (3, 2), stack=stack).matrix, cosines)
    assert trajectory(model, tokens, (3, 2), stack=stack).scores.shape[:2] == (loops, 2)
    moved = state_motion(model, tokens, (3, 2), stack=stack, progress=False)
    torch.testing.assert_close(moved.step[1:], ((x[1:] - x[:-1]).norm(dim=-1) / x[1:].norm(dim=-1))[:, 1])
    assert cycle(model, tokens, (3, 2), stack=stack, progress=False).made_by["stack"] == stack
    assert limit_behaviour(model, tokens, (16, 1), stack=stack, progress=False).labels.shape == (2, 5)
    assert pattern_distances_of(cache, stack=stack).distance.shape[1:] == (2 * loops, 2 * loops)


@STACKS
def test_attention_stability_is_of_one_stack(model: LoopedModel, tokens: Tensor, cache: LoopedCache, stack: str):
    found = attention_stability(model, tokens, (3, 2), stack=stack, progress=False)
    patterns = cache.stack(f"{stack}.pattern")[:, :, 0]
    torch.testing.assert_close(found.tv_to_last, (patterns - patterns[-1]).abs().sum(-1).mean(-1) / 2)


def test_the_jacobian_is_that_of_both_states(model: LoopedModel, tokens: Tensor):
    short = tokens[:, :2]
    found = jacobian_spectrum(model, short, 2, k=2)
    state = model(short, 2, stop_at_loop=1).detach()
    frame = model.frame(model.batch(short, 2))
    whole: Any = torch.autograd.functional.jacobian(lambda x: model.transformer.loop(x, None, frame, 1), state)
    values = torch.linalg.eigvals(whole.reshape(64, 64)).abs().sort(descending=True).values
    torch.testing.assert_close(found.eigenvalues.abs()[:1], values[:1], rtol=1e-6, atol=1e-9)


def test_a_record_has_every_place(model: LoopedModel, tokens: Tensor, cache: LoopedCache, tmp_path: Path):
    names = ["L_blocks.state_post", "H_blocks.resid_post"]
    found = record(model, tokens, (3, 2), sites=names, out=tmp_path / "record", loops=[0, -1], progress=False)
    assert torch.equal(found.tensor("L_blocks.state_post", loop=-1), cache["L_blocks.state_post", 5][0])
    assert torch.equal(found.tensor("H_blocks.resid_post", 1, 2), cache["H_blocks.resid_post", 1, 2][0])
    assert found.grid("L_blocks.state_post").loops == (0, 1, 4, 5)
    with pytest.raises(InputError, match="'state_post' is at two places in custom"):
        record(model, tokens, sites=["state_post"], out=tmp_path / "other")


def test_steering_is_by_the_loops_of_a_stack(model: LoopedModel, tokens: Tensor):
    towards = directions(
        model, tokens, against=tokens_for(model, batch=1, seed=8), site="L_blocks.resid_post", layers=[1]
    )
    assert towards.loops == (0, 1, 2, 3)
    found = steering_sweep(model, tokens, directions=towards, metric=total, strengths=[2.0], draws=0, progress=False)
    hooks = [("L_blocks.1.loop.3.hook_resid_post", lambda x, hook: x + 2 * towards.vectors[3, 0])]
    with torch.no_grad():
        effect = total(model.run_with_hooks(tokens, fwd_hooks=hooks)) - total(model(tokens))
    torch.testing.assert_close(found.effect[0, 3], effect)


def test_stages_know_every_layer_call(model: LoopedModel, tokens: Tensor, cache: LoopedCache):
    found = massive_activations(model, tokens, (3, 2), top=1)
    calls = found.schedule.layer_calls()
    ratios = [cache[f"{s}.{layer}.loop.{t}.hook_resid_post"].abs() for s, layer, t in calls]
    torch.testing.assert_close(found.largest_ratio, torch.stack([x.max() / x.flatten().quantile(0.5) for x in ratios]))
    silent = ablation_effect(
        model, tokens, (3, 2), layer=1, loops=3, stack="L_blocks", measures=[STAGE_MEASURES[0]], progress=False
    )
    change = silent.change(STAGE_MEASURES[0].name)
    at = found.schedule.realised_depth("L_blocks", 1, 3)
    assert bool((change[: at + 1] == 0).all()) and bool((change[at + 1 :] != 0).any())
    with pytest.raises(InputError, match="there is no stack 'blocks': L_blocks 2 x 6 loops, H_blocks 2 x 3 loops"):
        ablation_effect(model, tokens, (3, 2), layer=0)


# What knows one core only.

REFUSES: dict[str, Callable[[LoopedModel, Tensor], Any]] = {
    "attention_bound": attention_bound,
    "path_independence": lambda model, tokens: path_independence(model, tokens, noise=0.5),
    "path_patch": lambda model, tokens: path_patch(
        model,
        tokens,
        source=model.run_with_cache(tokens)[1],
        metric=total,
        sender=Sender(0, 0, "mlp"),
        receivers=[Receiver("readout")],
    ),
}


# These take the stack that the head reads, where none is named.
_OF_THE_HEAD = ("logit_lens", "fit_tuned_lens", "jacobian_lens", "compare_lenses", "long_run")


@pytest.mark.parametrize("name", sorted(set(analyses()) - {"record", "directions", "steering_sweep"}))
def test_every_call_takes_two_stacks_or_refuses(name: str):
    """With the stack where it has one; and where it has and is not told, it says which there are."""
    model = make(tokenizer=word_tokenizer(), **{**TWO_STATES, "two_states": TwoStates(1)})
    prompts = ["a b c d"] * (6 if name == "fit_tuned_lens" else 1)
    takes = "stack" in inspect.signature(analyses()[name]).parameters
    said = ""
    try:
        call(name, model, prompts, 16, **({"stack": "H_blocks"} if takes else {}))
    except InputError as error:
        said = str(error)
    assert not said or "two stacks loop in it" in said
    if takes and not said and name not in ("ablation_effect", *_OF_THE_HEAD):
        with pytest.raises(InputError, match="what loops in custom is L_blocks and H_blocks: pass stack="):
            call(name, model, prompts, 16)


@pytest.mark.parametrize("name", REFUSES)
def test_what_asks_for_one_core_refuses_by_name(model: LoopedModel, tokens: Tensor, name: str):
    message = (
        "this asks for one core with one state, but custom is not so: two stacks loop in it, L_blocks and H_blocks"
    )
    with pytest.raises(InputError, match=message):
        REFUSES[name](model, tokens)


@STACKS
def test_the_long_run_is_of_one_stack(stack: str):
    """A stack's own loops: as judged from its states, each of them kept."""
    model = make(**TWO_STATES)
    prompt = tokens_for(model, batch=1)
    found = long_run(model, prompt, (40, 2), stack=stack, progress=False)
    _, cache = model.run_with_cache(prompt, (40, 2), names_filter=lambda name: "hook_state_post" in name)
    states = cache.stack(f"{stack}.state_post")[:, 0]
    assert len(states) == (80 if stack == "L_blocks" else 40) and found.made_by["stack"] == stack
    wanted = judge_states(sketch(states).movedim(1, -1))
    assert torch.equal(found.verdict, wanted["verdict"])
    with pytest.raises(InputError, match="what loops in custom is L_blocks and H_blocks: pass stack=.*got 'blocks'"):
        long_run(model, prompt, (40, 2), stack="blocks")


def test_neurons_of_both_stacks(model: LoopedModel):
    found = neuron_shares(model)
    assert found.stacks == ("L_blocks", "L_blocks", "H_blocks", "H_blocks") and found.layers == (0, 1, 0, 1)
    block = model.transformer.get_submodule("H_blocks.1")
    gain = model.transformer.head_gain
    W_U = model.W_U if gain is None else model.W_U * gain[:, None]
    effects = logit_effects(block.mlp.W_out.detach(), W_U.detach())
    torch.testing.assert_close(found.kurtosis[3], effects.kurtosis)


def test_a_report_looks_at_the_stack_that_the_head_reads():
    model = LoopedModel.from_pretrained(PARITY / "hrm-text")
    data = collect(model, [Prompt(token_ids=(1, 5, 7, 2)), Prompt(token_ids=(3, 5, 2))], (3, 2))
    assert (data.n_loops, data.stack) == (3, "H_blocks")
    reading, tokens = data.readings[0], torch.tensor([[1, 5, 7, 2]])
    _, cache = model.run_with_cache(tokens, (3, 2))
    states = torch.stack([cache["H_blocks.state_pre", 0], *cache.stack("H_blocks.state_post")])[:, 0]
    steps = (states[1:] - states[:-1]).norm(dim=-1) / states[1:].norm(dim=-1)
    torch.testing.assert_close(reading.step, steps, rtol=1e-4, atol=1e-5)
    assert {layer.stack for layer in reading.attention} == {"H_blocks"}
    torch.testing.assert_close(
        reading.attention[1].pattern[2], cache["H_blocks.pattern", 1, 2][0], rtol=1e-4, atol=1e-5
    )
    for t in range(3):
        said = model(tokens, (t + 1, 2))[0, -1].softmax(-1).max().detach()
        torch.testing.assert_close(reading.top_probs[t, -1, 0], said, rtol=1e-4, atol=1e-5)
    html = report_page(data, "x", [*readout_sections(model, data), *loop_analyses(model, data, 16)])
    for words in ("this page looks at H_blocks", "3 loops, each 2 times L_blocks and once H_blocks, of 2 layers"):
        assert words in html


def test_a_record_comes_back_as_the_cache_of_its_own_run(model: LoopedModel, tokens: Tensor, tmp_path: Path):
    """Of a pair of counts, the second is not the trained one; of the fast stack, loops are its own."""
    sites = ["L_blocks.resid_post", "H_blocks.state_post"]
    recorded = record(model, tokens, (2, 3), sites=sites, out=tmp_path / "pair", progress=False)
    kept, (_, cache) = recorded.cache(model, range(len(tokens))), model.run_with_cache(tokens, (2, 3))
    assert kept.run.counts == (2, 3) and kept.kept_loops == (0, 1)
    for name in sites:
        assert torch.equal(kept.stack(name), cache.stack(name))
    assert torch.equal(kept["L_blocks.resid_post", 1, 4], cache["L_blocks.resid_post", 1, 4])
    prefixed = record(model, tokens, sites=sites, out=tmp_path / "prefix", progress=False, prefix_length=2)
    with pytest.raises(InputError, match="the run was given prefix, which is not kept here"):
        prefixed.cache(model, [0])
