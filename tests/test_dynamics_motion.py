"""Step by step through the loops, against all states of a full cache."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from helpers import TINY, hook_count, make, tiny, tokens_for

from tl_looped import InputError
from tl_looped.dynamics import LoopMotion, loop_motion

LOOPS = 6
NAMES = ("step", "angle", "acceleration", "step_change")


@pytest.mark.parametrize("family", sorted(TINY))
@pytest.mark.parametrize("layer", [0, -1])
def test_it_is_what_the_states_of_all_loops_say(family: str, layer: int) -> None:
    model = tiny(family, torch.float64)
    tokens = tokens_for(model, batch=1)
    found = loop_motion(model, tokens, LOOPS, layer=layer)
    with torch.no_grad():
        _, cache = model.run_with_cache(tokens, LOOPS)
    x = [cache["resid_post", layer, t][0] for t in range(LOOPS)]
    for t in range(LOOPS):
        for pos in range(tokens.shape[1]):
            now = [getattr(found, name)[t, pos].item() for name in ("step", "angle", "acceleration", "step_change")]
            if t == 0:
                assert all(map(math.isnan, now))
                continue
            step, size = x[t][pos] - x[t - 1][pos], x[t][pos].norm().item()
            assert now[0] == pytest.approx(step.norm().item() / size, rel=1e-10)
            if t == 1:
                assert all(map(math.isnan, now[1:]))
                continue
            before = x[t - 1][pos] - x[t - 2][pos]
            cosine = (step @ before / step.norm() / before.norm()).item()
            assert math.cos(now[1]) == pytest.approx(cosine, abs=1e-9)
            assert now[2] == pytest.approx((step - before).norm().item() / size, rel=1e-9)
            earlier = before.norm().item() / x[t - 1][pos].norm().item()
            assert now[3] == pytest.approx(step.norm().item() / size - earlier, abs=1e-10)


def test_result(tmp_path: Path) -> None:
    model = tiny("huginn")
    found = loop_motion(model, tokens_for(model, batch=1), LOOPS, seed=3)
    assert found.made_by["n_loops"] == LOOPS and found.made_by["initial_state"] == "seed 3"
    table = found.to_dataframe()
    assert len(table) == LOOPS * 5 and list(table)[:3] == ["loop", "pos", "token"]
    row = table[(table["loop"] == 4) & (table["pos"] == 2)].iloc[0]
    assert row["angle"] == pytest.approx(found.angle[4, 2].item())
    loaded = LoopMotion.load(found.save(tmp_path / "motion"))
    torch.testing.assert_close(loaded.step, found.step, equal_nan=True)
    fig = found.plot()
    assert len(fig.data) == 4
    assert [float("nan") if y is None else y for y in fig.data[0].y][3] == pytest.approx(
        found.step[3, -1].item(), rel=1e-4
    )


def test_bad_input() -> None:
    model = tiny("llama")
    tokens = tokens_for(model, batch=1)
    with pytest.raises(InputError, match="layer 2 is out of range: 2 exist"):
        loop_motion(model, tokens, LOOPS, layer=2)
    with pytest.raises(InputError, match="one prompt, got 2"):
        loop_motion(model, tokens_for(model), LOOPS)
    with pytest.raises(InputError, match="n_loops"):
        loop_motion(model, tokens, 1)
    broken = make(**TINY["llama"])
    with torch.no_grad():
        broken.transformer.blocks[1].mlp.down.weight.fill_(float("inf"))
    with pytest.raises(InputError, match="not finite, from 'blocks.1.loop.0.hook_mlp_out' .* on"):
        loop_motion(broken, tokens, LOOPS)
    assert hook_count(broken) == 0
