"""Every call on a model of dynamics and attention: its prompt in every form, read once, or refused in clear words."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import TINY, make, tiny, word_tokenizer

from tl_looped import InputError, LoopedModel
from tl_looped.attention import attention_bound, attention_stability
from tl_looped.dynamics import (
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
from tl_looped.engine.engine import Engine

ONE = {
    "attention_bound": attention_bound,
    "jacobian_spectrum": jacobian_spectrum,
    "path_independence": path_independence,
    "trajectory": trajectory,
}
MANY = {
    "attention_stability": attention_stability,
    "convergence": convergence,
    "cycle": cycle,
    "limit_behaviour": limit_behaviour,
    "long_run": long_run,
    "similarity": similarity,
    "state_motion": state_motion,
}
EVERY = pytest.mark.parametrize("name", [*ONE, *MANY])
LOOPS = 16  # the fewest that limit_behaviour takes


def call(name: str, model: LoopedModel, prompts: Any, n_loops: int | None = None, **options: Any) -> Any:
    analysis: Callable[..., Any] = {**ONE, **MANY}[name]
    quiet = {} if name in ONE or name == "similarity" else {"progress": False}
    return analysis(model, prompts, n_loops, **quiet, **options)


def numbers(result: Any) -> dict[str, torch.Tensor]:
    fields = {name: getattr(result, name) for name in result.__dataclass_fields__}
    return {name: value.nan_to_num(-9) for name, value in fields.items() if isinstance(value, torch.Tensor)}


@EVERY
def test_every_form_gives_the_same(name: str, tmp_path: Path) -> None:
    model = make(tokenizer=word_tokenizer(), **TINY["huginn"])
    text = "a b c d"
    (tmp_path / "prompt.txt").write_text(text)
    tokens = model.to_tokens(text)
    expected = numbers(call(name, model, text, LOOPS))
    forms = [
        tokens,
        tokens.tolist(),
        [text],
        (one for one in [text]),  # which can be read once only
        model.tokenizer([text], return_tensors="pt"),
        tmp_path / "prompt.txt",
        model.prepare(text, LOOPS),
    ]
    for form in forms:
        found = numbers(call(name, model, form, None if form is forms[-1] else LOOPS))
        for field, value in expected.items():
            torch.testing.assert_close(found[field], value, rtol=1e-3, atol=1e-5)


@EVERY
def test_prompts_are_read_once(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    read, prepare = [], Engine.prepare

    def count(self: Engine, prompts: Any, *args: Any, **options: Any) -> Any:
        read.append(prompts)
        return prepare(self, prompts, *args, **options)

    monkeypatch.setattr(Engine, "prepare", count)
    call(name, tiny("llama"), [[1, 2, 3]], LOOPS)
    assert [one for one in read if isinstance(one, list)] == [[[1, 2, 3]]]


@pytest.mark.parametrize("name", ONE)
def test_several_prompts_where_one_is_needed(name: str) -> None:
    with pytest.raises(InputError, match="this looks at one prompt, got 3: call it for each"):
        call(name, tiny("llama"), [[1, 2, 3], [4, 5], [6, 7]], LOOPS)


@EVERY
def test_parts_of_runs_are_refused(name: str) -> None:
    model = tiny("llama")
    state = torch.zeros(1, 3, 16)
    for part in ({"stop_at_loop": 2}, {"start_at_loop": 1, "initial_state": state}):
        with pytest.raises(
            InputError, match=r"leave out (initial_state|start_at_loop and stop_at_loop)|initial_states="
        ):
            call(name, model, model.prepare([[1, 2, 3]], LOOPS, **part))
    with pytest.raises(InputError, match="these runs are prepared already: pass n_loops to model.prepare instead"):
        call(name, model, model.prepare([[1, 2, 3]]), LOOPS)
    with pytest.raises(InputError, match=f"{name} has no argument 'sed'. Nearest: 'seed'"):
        call(name, model, [[1, 2, 3]], LOOPS, sed=1)


@EVERY
def test_how_many_loops_run(name: str) -> None:
    model = tiny("llama")
    trained = name in ("attention_bound", "attention_stability", "similarity", "trajectory")
    found = call(name, model, [[1, 2, 3]])
    assert found.made_by["n_loops"] == (model.cfg.n_loops if trained else 128)
    assert call(name, model, model.prepare([[1, 2, 3]], LOOPS)).made_by["n_loops"] == LOOPS
