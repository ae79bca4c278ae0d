"""Every public name: the shape of its call, what it returns, and that it takes prompts in any form."""

from __future__ import annotations

import ast
import importlib.util
import inspect
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_type_hints

import pandas as pd
import pytest
import torch
from analyses import NEEDS, ONE_PROMPT, ROOMS, TOP, analyses, call, public, room
from datasets import Dataset
from helpers import TINY, make, word_tokenizer

import tl_looped
from tl_looped import InputError, LoopedModel
from tl_looped.engine.results import AnyResult
from tl_looped.engine.runs import RunOptions

PARAMETER = inspect.Parameter
NAMES = sorted(analyses())
OWN_TESTS = {"record", "directions", "aligned_source", "steering_sweep", "paper_claims"}  # a folder, or more prompts
OPTIONS = set(get_type_hints(RunOptions))
NOT_RESULTS = {"view_prompt", "mean_source"}  # a view, and what is put in place of activations
FUNCTIONS = [
    pytest.param(value, id=f"{name}.{called}")
    for name in ROOMS
    for called, value in public(room(name)).items()
    if inspect.isfunction(value)
]
RESULTS = [
    pytest.param(value, id=value.__name__)
    for module in [tl_looped, *map(room, ROOMS)]
    for value in public(module).values()
    if inspect.isclass(value) and issubclass(value, AnyResult)
]


def test_the_walk_finds_what_there_is() -> None:
    assert len(NAMES) >= 18 and len(RESULTS) >= 22
    assert {"logit_lens", "observe", "patch_sweep", "convergence", "attention_stability"} <= set(NAMES)
    assert set(NEEDS) | ONE_PROMPT <= set(NAMES)


def test_imports_go_one_way() -> None:
    """A room imports from itself and from those before it."""
    order = ["engine", "viz", "nn", "adapters", "observe", "generation", "unrolled", "model", "lens", "dynamics"]
    order += ["attention", "patching", "circuits", "stages", "record", "claims", "training", "report"]
    package = Path(tl_looped.__file__).parent
    wrong = []
    for path in package.rglob("*.py"):
        own = path.relative_to(package).parts[0].removesuffix(".py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            module = node.module or "" if isinstance(node, ast.ImportFrom) else ""
            if not module.startswith("tl_looped.") or own in ("__init__", "__main__"):
                continue
            other = module.split(".")[1]
            if order.index(other) > order.index(own):
                wrong.append(f"{path.relative_to(package)} imports {module}")
    assert wrong == []


# The shape.


@pytest.mark.parametrize("name", NAMES)
def test_a_call_has_the_one_shape(name: str) -> None:
    """analysis(model, prompts, n_loops=None, *, ..., every run option by name)."""
    parameters = inspect.signature(analyses()[name]).parameters
    first, rest = list(parameters.values())[:3], list(parameters.values())[3:]
    assert [one.name for one in first] == ["model", "prompts", "n_loops"]
    assert first[2].default is None
    assert {one.kind for one in first} == {PARAMETER.POSITIONAL_OR_KEYWORD}
    assert {one.kind for one in rest} == {PARAMETER.KEYWORD_ONLY}
    assert {option for option in OPTIONS if option not in parameters} == set()


@pytest.mark.parametrize("function", FUNCTIONS)
def test_no_function_takes_what_it_does_not_name(function: Callable[..., Any]) -> None:
    parameters = inspect.signature(function).parameters
    kinds = {one.kind for one in parameters.values()}
    assert not kinds & {PARAMETER.VAR_KEYWORD, PARAMETER.VAR_POSITIONAL}
    assert not {"input", "prompt", "text", "texts", "corrupted", "tokens_or_text"} & set(parameters) or (
        "model" not in parameters
    )


@pytest.mark.parametrize("name", NAMES)
def test_another_name_is_refused_in_the_words_of_the_call(name: str) -> None:
    with pytest.raises(InputError, match=rf"{name} has no argument 'sed'. Nearest: .*'seed'"):
        analyses()[name](make(), "a b", sed=1)


@pytest.mark.parametrize("name", ROOMS)
def test_no_function_has_the_name_of_a_module(name: str) -> None:
    functions = [called for called, value in public(room(name)).items() if inspect.isfunction(value)]
    assert [one for one in functions if importlib.util.find_spec(f"tl_looped.{name}.{one}")] == []
    assert not any(called.startswith("loop_") for called in analyses())


def test_public_names_are_few() -> None:
    names = {(module, name) for module in ROOMS for name in public(room(module))} | {("", name) for name in TOP}
    assert len(names) <= 180
    package = Path(tl_looped.__file__).parent
    rooms = [path for path in package.iterdir() if path.is_dir() and (path / "__init__.py").exists()]
    assert len(rooms) <= 17


# What comes back.


@pytest.mark.parametrize("kind", RESULTS)
def test_a_result_says_shows_and_keeps_itself(kind: type[AnyResult]) -> None:
    for method in ("to_dataframe", "plot"):
        assert getattr(kind, method) is not getattr(AnyResult, method), method
    assert kind.__repr__ is AnyResult.__repr__ or kind.__name__ in ("LoopedCache", "Recorded")
    assert all(hasattr(kind, name) for name in ("_repr_html_", "show", "save", "load"))


@pytest.mark.parametrize("name", [name for name in NAMES if name not in NOT_RESULTS | OWN_TESTS])
def test_a_call_returns_a_result(name: str, model: LoopedModel) -> None:
    found = call(name, model, ["a b c d"] * (6 if name == "fit_tuned_lens" else 1), 16)
    assert isinstance(found, AnyResult)
    assert found.made_by["n_loops"] == 16
    assert repr(found).startswith(f"{type(found).__name__}(") and len(repr(found)) < 2000
    assert type(found).__name__ in found._repr_html_()
    assert isinstance(found.to_dataframe(), pd.DataFrame)


# Prompts in any form.


@pytest.fixture(scope="module")
def model() -> LoopedModel:
    return make(tokenizer=word_tokenizer(chat_template=_CHAT), **TINY["added"])


_CHAT = "{% for message in messages %}{{ message['content'] }} {% endfor %}"
_TEXTS = ["a b c d", "e f g h"]


def _forms(model: LoopedModel, folder: Path, texts: list[str]) -> dict[str, tuple[Callable[[], Any], dict[str, Any]]]:
    """A maker of the prompts in each form, for some are read once, and the options that go with it."""
    ids = [[int(one) for one in model.to_tokens(text)[0]] for text in texts]
    plain, lines = folder / "prompts.txt", folder / "prompts.jsonl"
    plain.write_text("\n".join(texts), encoding="utf-8")
    rows = [{"question": text} for text in texts]
    lines.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    forms: dict[str, tuple[Callable[[], Any], dict[str, Any]]] = {
        "texts": (lambda: texts, {}),
        "generator": (lambda: (text for text in texts), {}),
        "tensor": (lambda: torch.tensor(ids), {}),
        "lists": (lambda: ids, {}),
        "encoding": (lambda: model.tokenizer(texts, return_tensors="pt", padding=True), {}),
        "messages": (lambda: [[{"role": "user", "content": text}] for text in texts], {}),
        "file": (lambda: plain, {}),
        "jsonl": (lambda: lines, {"field": "question"}),
        "dataset": (lambda: Dataset.from_list(rows), {"field": "question"}),
        "limit": (lambda: [*texts, "a a a a a"], {"limit": len(texts)}),
    }
    return forms


@pytest.mark.parametrize("name", [name for name in NAMES if name not in OWN_TESTS])
def test_every_form_of_prompts_gives_the_same(name: str, model: LoopedModel, tmp_path: Path) -> None:
    texts = _TEXTS[:1] if name in ONE_PROMPT else _TEXTS
    if name == "fit_tuned_lens":
        texts = _TEXTS * 3
    wanted = _numbers(call(name, model, model.prepare(texts, 16)))
    for form, (prompts, options) in _forms(model, tmp_path, texts).items():
        if name == "path_patch" and options:
            continue  # its cache was made without them
        found = _numbers(call(name, model, prompts() if name != "path_patch" else texts, 16, **options))
        assert found.keys() == wanted.keys()
        for key, value in found.items():
            torch.testing.assert_close(value, wanted[key], equal_nan=True, msg=lambda text: f"{form}, {key}: {text}")


def _numbers(found: Any) -> dict[str, torch.Tensor]:
    """The tensors of a result."""
    contents = found._contents() if isinstance(found, AnyResult) else vars(found) if hasattr(found, "__dict__") else {}
    return {name: value for name, value in contents.items() if isinstance(value, torch.Tensor)}


def test_names_of_the_package_are_found_when_asked_for():
    tree = ast.parse(Path(tl_looped.__file__).read_text(encoding="utf-8"))
    found = [name.asname for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) for name in node.names]
    names = {name for name in found if name}
    assert names == set(tl_looped._HOMES) and names <= set(dir(tl_looped))
    assert all(getattr(tl_looped, name).__module__.startswith("tl_looped.") for name in names - {"DEFAULT_SEED"})
    with pytest.raises(AttributeError, match="'tl_looped' has no attribute 'HookedTransformer': LoopedCache, .* are"):
        getattr(tl_looped, "HookedTransformer")  # noqa: B009 - pyright knows that it is not there
