"""Steering: what is added and taken out in closed form, and what it does to a model beside random directions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import TINY, hook_count, make, tiny, tokens_for

from tl_looped import LoopedModel
from tl_looped.record import Directions, Steered, directions, directions_of, record, steering_sweep
from tl_looped.training.variable_chains import draw_contexts, solve

LOOPS = 3


def some(model: LoopedModel, site: str = "state_post", **options: Any) -> Directions:
    one, other = tokens_for(model, 3), tokens_for(model, 4, seed=8)
    return directions(model, one, LOOPS, against=other, site=site, **options)


def last(model: LoopedModel, cells: Any, seed: int = 3) -> torch.Tensor:
    return model.run_with_cache(tokens_for(model, cells, seed=seed), LOOPS)[1].stack("state_post")[:, :, -1].double()


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_directions_are_differences_of_means(dtype: torch.dtype, tmp_path: Path) -> None:
    model = tiny("ouro", dtype)
    one, other = last(model, 3), last(model, 4, 8)
    found = some(model)
    expected = one.mean(1) - other.mean(1)
    assert torch.allclose(found.vectors[:, 0], expected, atol=1e-12) and found.examples == (3, 4)
    stream = torch.cat([one, other], 1).norm(dim=-1).mean(1)
    assert torch.allclose(found.stream[:, 0], stream) and torch.allclose(
        found.relative[:, 0], expected.norm(dim=-1) / stream
    )
    prompts = [*tokens_for(model, 3).tolist(), *tokens_for(model, 4, seed=8).tolist()]
    recorded = record(model, prompts, LOOPS, sites="state_post", positions="last", out=tmp_path / "r", progress=False)
    again = directions_of(recorded, ["a"] * 3 + ["b"] * 4, "a")
    assert torch.allclose(again.vectors, found.vectors, atol=1e-12 if dtype == torch.float64 else 0.02)
    assert torch.equal(Directions.load(found.save(tmp_path / "d")).vectors, found.vectors)


@pytest.mark.parametrize(
    ("options", "loops"), [({"loop": 1, "when": "at"}, [1]), ({"loop": 1, "when": "from"}, [1, 2]), ({}, [0, 1, 2])]
)
def test_what_is_added_is_the_direction_of_each_loop(options: dict[str, Any], loops: list[int]) -> None:
    model = tiny("llama", torch.float64)
    found = some(model, "resid_post")
    tokens, added = tokens_for(model), {}
    before: dict[int, torch.Tensor] = {}

    def keep(x: torch.Tensor, hook: Any) -> None:
        before[hook.loop] = x.clone()

    hooks = [("blocks.1.hook_resid_post", keep), *found.hooks(-2.5, layer=1, **options)]
    with model.hooks(fwd_hooks=hooks):
        after = model.run_with_cache(tokens, LOOPS)[1]
    for t in range(LOOPS):
        added[t] = after["resid_post", 1, t] - before[t]
        expected = -2.5 * found.vectors[t, 1] if t in loops else torch.zeros(16, dtype=torch.float64)
        assert torch.allclose(added[t], expected.expand_as(added[t]), atol=1e-12)
    assert hook_count(model) == 0


def test_ablation_leaves_nothing_along_the_direction_and_the_rest_as_it_was() -> None:
    model = tiny("ouro", torch.float64)
    found = some(model)
    tokens = tokens_for(model)
    with model.hooks(fwd_hooks=found.hooks(loop=0, when="at", ablate=True)):
        after = model.run_with_cache(tokens, LOOPS)[1]["state_post", 0]
    x, u = model.run_with_cache(tokens, LOOPS)[1]["state_post", 0], found.vectors[0, 0] / found.vectors[0, 0].norm()
    assert float((after @ u).abs().max()) < 1e-12
    assert torch.allclose(after, x - (x @ u)[..., None] * u, atol=1e-12)


def test_another_loops_direction_at_some_positions_of_text_that_is_generated() -> None:
    model = tiny("llama")
    found = some(model)
    hooks = found.hooks(4.0, loop=1, when="at", source_loop=2, positions=[1, 6])
    tokens = tokens_for(model, 1)
    with model.hooks(fwd_hooks=hooks):
        changed = model.run_with_cache(tokens, LOOPS)[1]["state_post", 1]
    moved = changed - model.run_with_cache(tokens, LOOPS)[1]["state_post", 1]
    assert torch.allclose(moved[0, 1], 4 * found.vectors[2, 0].float(), atol=1e-5) and not bool(
        moved[0, [0, 2, 3, 4]].any()
    )
    texts = []
    for cached in (True, False):
        options: dict[str, Any] = {"do_sample": False, "use_past_kv_cache": cached, "verbose": False}
        with model.hooks(fwd_hooks=hooks):
            texts.append(model.generate(tokens, 4, LOOPS, stop_at_eos=False, **options))
    assert torch.equal(texts[0], texts[1])


def test_random_directions_have_the_same_lengths() -> None:
    found = some(tiny("llama"))
    drawn = found.random(3)
    assert torch.allclose(drawn.vectors.norm(dim=-1), found.vectors.norm(dim=-1))
    assert torch.equal(drawn.vectors, found.random(3).vectors) and not torch.equal(
        drawn.vectors, found.random(4).vectors
    )


def test_a_sweep_is_its_runs_one_by_one() -> None:
    model = make(torch.float64, **TINY["ouro"])
    found = some(model, "resid_post", layers=[1])
    prompts = [[1, 2, 3], [4, 5], [6, 7, 8]]

    def metric(logits: torch.Tensor) -> torch.Tensor:
        return logits[:, -1, 3]

    for when in ("at", "from", "every"):
        swept = steering_sweep(
            model,
            prompts,
            LOOPS,
            directions=found,
            metric=metric,
            strengths=[-1.0, 2.0],
            when=when,
            draws=2,
            progress=False,
        )
        assert swept.effect.shape == (2, 1 if when == "every" else LOOPS, 3) and swept.null.shape == (
            2,
            *swept.effect.shape,
        )
        t = None if when == "every" else 1
        for p, prompt in enumerate(prompts):
            base = model(torch.tensor([prompt]), LOOPS)[0, -1, 3].item()
            for found_here, values in ((found, swept.effect), (found.random(1), swept.null[1])):
                hooks = found_here.hooks(2.0, t, when=when)
                logit = model.run_with_hooks(torch.tensor([prompt]), LOOPS, fwd_hooks=hooks)[0, -1, 3].item()
                assert values[1, t or 0, p].item() == pytest.approx(logit - base, abs=1e-12)
            assert swept.baseline[p].item() == pytest.approx(base, abs=1e-12)
    assert torch.allclose(swept.relative, torch.tensor([[1.0], [2.0]], dtype=torch.float64) * found.relative.mean())
    assert len(swept.to_dataframe()) == 2 and len(swept.plot().data) == 6
    assert isinstance(found.plot().data[0].y, tuple) and len(found.to_dataframe()) == LOOPS


@pytest.mark.usefixtures("as_a_user")
def test_what_is_refused(tmp_path: Path) -> None:
    model = tiny("llama")
    tokens = tokens_for(model)
    found, layered = some(model), some(model, "resid_post")
    same = directions(model, tokens, LOOPS, against=tokens, site="state_post")
    recorded = record(model, tokens, LOOPS, sites=["state_post", "z"], out=tmp_path / "r", progress=False)
    for call, message in [
        (lambda: same.hooks(), "the direction at loop 0 has length zero, as both groups have the same mean"),
        (lambda: same.hooks(ablate=True), "has length zero"),
        (lambda: found.hooks(loop=5, when="at"), r"there is no direction for loop=5: pass one of \[0, 1, 2\]"),
        (lambda: found.hooks(when="at"), "when='at' needs a loop: got loop=None"),
        (lambda: found.hooks(loop=1), "when='every' takes no loop: got loop=1"),
        (lambda: found.hooks(when="often"), "when must be one of"),
        (lambda: found.hooks(float("nan")), "strength must be a finite number"),
        (lambda: layered.hooks(), r"there is no direction for layer=None: pass one of \[0, 1\]"),
        (lambda: some(model, "z"), r"hook_z' is .* and a direction needs \[batch, pos, d_model\]"),
        (lambda: directions_of(recorded, [1, 2, 3], 1, site="state_post"), "3 labels for 2 prompts"),
        (lambda: directions_of(recorded, [1, 2], 3, site="state_post"), "none of the labels are 3: give two groups"),
        (lambda: directions_of(recorded, [1, 1], 1, site="state_post"), "all of the labels are 1"),
        (
            lambda: steering_sweep(model, tokens, LOOPS, directions=found, metric=lambda x: x.mean(), progress=False),
            r"metric must return a number for each prompt, \[batch\], got \(\)",
        ),
        (
            lambda: steering_sweep(
                model, model.prepare(tokens, LOOPS, stop_at=(1, 1)), directions=found, metric=lambda x: x.sum((1, 2))
            ),
            "a metric reads logits, and these runs stop before: leave out stop_at",
        ),
    ]:
        with pytest.raises(ValueError, match=message):
            call()
    assert hook_count(model) == 0


def test_a_direction_makes_looped_hops_say_another_digit_and_a_random_one_does_not(tmp_path: Path) -> None:
    model, rng = LoopedModel.from_pretrained("looped-hops"), np.random.default_rng(0)
    contexts = draw_contexts(rng, 440, 7, 4, True)
    prompts = [contexts.text(row, int(np.flatnonzero(contexts.hops[row] == 4)[0])) for row in range(440)]
    answers = [solve(prompt)[0] for prompt in prompts]
    recorded = record(
        model, prompts[:400], sites="state_post", positions="last", out=tmp_path / "r", batch_size=100, progress=False
    )
    found, seven = directions_of(recorded, answers[:400], "7"), model.to_single_token("7")
    # The answer is at the query from the fourth loop on, and so is what tells the answers apart.
    assert float(found.relative[:3].max()) < 0.3 and float(found.relative[3:].min()) > 0.8
    others = [prompt for prompt, answer in zip(prompts[400:], answers[400:], strict=True) if answer != "7"]

    def says_seven(logits: torch.Tensor) -> torch.Tensor:
        return logits.detach()[:, -1].softmax(-1)[:, seven]

    swept = steering_sweep(
        model, others, directions=found, metric=says_seven, strengths=[1.5], draws=2, batch_size=64, progress=False
    )
    effect, null = swept.effect.mean(-1)[0], swept.null.mean(-1)[:, 0]
    assert float(effect[3:].min()) > 0.9 and float(effect[:3].abs().max()) < 0.05 and float(null.abs().max()) < 0.1
    assert isinstance(swept, Steered) and float(swept.baseline.max()) < 0.05
    ablated = found.hooks(loop=3, when="from", ablate=True)
    sevens = [prompt for prompt, answer in zip(prompts, answers, strict=True) if answer == "7"][:20]
    says = says_seven(model.run_with_hooks(sevens, fwd_hooks=ablated))
    assert float(says.mean()) < float(says_seven(model(sevens)).mean()) - 0.3
