"""Step by step through the loops, against all states of a full cache."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from helpers import TINY, hook_count, make, tiny, tokens_for

from tl_looped import InputError
from tl_looped.dynamics import MOTION, StateMotion, motion_of, state_motion
from tl_looped.engine.numbers import median
from tl_looped.observe import observe

LOOPS = 5
PROMPTS = [[2, 5, 7], [3, 4, 9, 11, 6], [8, 1, 7]]


@pytest.mark.parametrize("family", sorted(TINY))
@pytest.mark.parametrize("layer", [0, -1])
def test_it_is_what_the_states_of_all_loops_say(family: str, layer: int) -> None:
    model = tiny(family, torch.float64)
    found = state_motion(model, PROMPTS, LOOPS, layer=layer, progress=False)
    assert found.places["prompt"].tolist() == [0] * 3 + [1] * 5 + [2] * 3
    with torch.no_grad():
        caches = [model.run_with_cache([prompt], LOOPS)[1] for prompt in PROMPTS]
    for token, prompt in enumerate(found.places["prompt"].tolist()):
        x = list(caches[prompt].stack("resid_post", layer)[:, 0, int(found.places["pos"][token])])
        for t in range(LOOPS):
            now = [getattr(found, name)[t, token].item() for name in ("step", "angle", "acceleration", "step_change")]
            if t == 0:
                assert all(map(math.isnan, now))
                continue
            step, size = x[t] - x[t - 1], x[t].norm().item()
            assert now[0] == pytest.approx(step.norm().item() / size, rel=1e-10)
            if t == 1:
                assert all(map(math.isnan, now[1:]))
                continue
            before = x[t - 1] - x[t - 2]
            cosine = (step @ before / step.norm() / before.norm()).item()
            assert math.cos(now[1]) == pytest.approx(cosine, abs=1e-9)
            assert now[2] == pytest.approx((step - before).norm().item() / size, rel=1e-9)
            earlier = before.norm().item() / x[t - 1].norm().item()
            assert now[3] == pytest.approx(step.norm().item() / size - earlier, abs=1e-10)


def test_an_observation_gives_the_same_and_means_over_prompts() -> None:
    model = tiny("olmo2")
    names = [one.name for one in MOTION]
    observed = observe(model, PROMPTS, LOOPS, measures=MOTION, per_token=names, progress=False)
    one, two = motion_of(observed), state_motion(model, PROMPTS, LOOPS, progress=False)
    assert torch.equal(one.angle.nan_to_num(-9), two.angle.nan_to_num(-9)) and one.layer == two.layer == 1
    means = torch.stack([one.angle[:, one.places["prompt"] == prompt].mean(1) for prompt in range(3)]).mean(0)
    torch.testing.assert_close(observed.by_loop("angle")[:, 1], means, equal_nan=True)
    with pytest.raises(InputError, match="layer 2 is out of range"):
        motion_of(observed, layer=2)


def test_result(tmp_path: Path) -> None:
    model = tiny("huginn")
    found = state_motion(model, PROMPTS, LOOPS, seed=3, progress=False)
    assert found.made_by["n_loops"] == LOOPS and found.made_by["initial_state"] == "seed 3"
    table = found.to_dataframe()
    assert len(table) == LOOPS * 11 and list(table)[:4] == ["loop", "prompt", "pos", "step"]
    row = table[(table["loop"] == 4) & (table["prompt"] == 1) & (table["pos"] == 2)].iloc[0]
    assert row["angle"] == pytest.approx(found.angle[4, 5].item())
    loaded = StateMotion.load(found.save(tmp_path / "motion"))
    torch.testing.assert_close(loaded.step, found.step, equal_nan=True)
    fig = found.plot()
    assert [trace.name for trace in fig.data] == ["last position"] * 2 + ["median over tokens"] * 2
    last = median(found.step[:, [2, 7, 10]])
    assert list(fig.data[0].y)[1:] == pytest.approx(last[1:].tolist(), rel=1e-4)
    assert list(fig.data[3].y)[2:] == pytest.approx(median(found.angle)[2:].tolist(), rel=1e-4)


def test_bad_input() -> None:
    model = tiny("llama")
    tokens = tokens_for(model, batch=1)
    with pytest.raises(InputError, match="layer 2 is out of range: 2 exist"):
        state_motion(model, tokens, LOOPS, layer=2)
    with pytest.raises(InputError, match="n_loops must be at least 3, got 2"):
        state_motion(model, tokens, 2)
    broken = make(**TINY["llama"])
    with torch.no_grad():
        broken.transformer.blocks[1].mlp.down.weight.fill_(float("inf"))
    with pytest.raises(InputError, match="not finite, from 'blocks.1.loop.0.hook_mlp_out' .* on"):
        state_motion(broken, tokens, LOOPS, progress=False)
    assert hook_count(broken) == 0


def test_states_that_do_not_move_have_no_picture() -> None:
    model = make()  # no injection: layers that add nothing leave the state as it is
    with torch.no_grad():
        for block in model.transformer.blocks:
            block.attn.o.weight.zero_()
            block.mlp.down.weight.zero_()
    found = state_motion(model, PROMPTS, 4, progress=False)
    assert bool((found.step[1:] == 0).all()) and bool(found.angle.isnan().all())
    with pytest.raises(InputError, match="no step is above zero, so there is nothing to draw"):
        found.plot()
