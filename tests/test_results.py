"""Every result of the lens comes back from its file as it was; what is no such file is refused."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import TINY, WORDS, make, tiny, tokens_for, word_tokenizer
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from tl_looped import InputError, LoopSchedule
from tl_looped.engine.results import Result
from tl_looped.lens import (
    ExitTrace,
    KLRule,
    LogitLens,
    ReadoutAgreement,
    TunedLens,
    fit_tuned_lens,
    logit_lens,
    readout_agreement,
    trace_exits,
)
from tl_looped.lens.trade_off import ExitCurves


@lru_cache
def results() -> dict[str, Result]:
    """One of each kind."""
    model = make(tokenizer=word_tokenizer(), **{**TINY["ouro"], "d_vocab": len(WORDS)})
    texts = ["a b c", "d e"]
    trace = trace_exits(model, texts, n_loops=3)
    fit = {"steps": 2, "progress": False, "held_out": ["f"]}
    return {
        "lens": logit_lens(model, texts, 3, site="resid_mid", positions=None, targets=["a", 3]),
        "lens of the state": logit_lens(model, texts, 3, padding_side="left"),
        "agreement": readout_agreement(model, texts, 3),
        "trace": trace,
        "curves": trace.curves(),
        "tuned": fit_tuned_lens(model, texts, per_loop=True, **fit),
        "tuned in float64": fit_tuned_lens(
            tiny("llama", torch.float64), tokens_for(tiny("llama"), 5), steps=2, progress=False
        ),
    }


def assert_equal(found: Any, wanted: Any, where: str = "") -> None:
    """The same values of the same types, tensors to the bit."""
    assert type(found) is type(wanted), where
    if isinstance(wanted, Tensor):
        assert found.dtype == wanted.dtype, where
        torch.testing.assert_close(found, wanted, rtol=0, atol=0, equal_nan=True)
    elif isinstance(wanted, (tuple, list)):
        assert len(found) == len(wanted), where
        for i, (one, other) in enumerate(zip(found, wanted, strict=True)):
            assert_equal(one, other, f"{where}[{i}]")
    elif isinstance(wanted, dict):
        assert list(found) == list(wanted), where
        for key in wanted:
            assert_equal(found[key], wanted[key], f"{where}[{key!r}]")
    else:
        assert found == wanted, where


KINDS = [
    ("lens", LogitLens),
    ("lens of the state", LogitLens),
    ("agreement", ReadoutAgreement),
    ("trace", ExitTrace),
    ("curves", ExitCurves),
    ("tuned", TunedLens),
    ("tuned in float64", TunedLens),
]


@pytest.mark.parametrize(("kind", "cls"), KINDS)
def test_a_result_comes_back_from_its_file(kind: str, cls: type[Result], tmp_path: Path) -> None:
    result = results()[kind]
    assert type(result) is cls
    path = result.save(tmp_path / "result.safetensors")
    found = cls.load(path)
    for field in dataclasses.fields(cls):
        assert_equal(getattr(found, field.name), getattr(result, field.name), field.name)
    assert found.to_dataframe().equals(result.to_dataframe())
    if hasattr(result, "plot"):
        assert found.plot().to_json() == result.plot().to_json()


def test_what_comes_back_works_as_before(tmp_path: Path) -> None:
    lens = LogitLens.load(results()["lens"].save(tmp_path / "lens"))
    assert lens.rank_trajectory("a").shape == (3, 2, 2, 3)
    assert lens.answer_flips().equals(results()["lens"].answer_flips())
    trace = ExitTrace.load(results()["trace"].save(tmp_path / "trace"))
    assert torch.equal(trace.exit_loops(KLRule(0.1)), results()["trace"].exit_loops(KLRule(0.1)))
    model = make(tokenizer=word_tokenizer(), **{**TINY["ouro"], "d_vocab": len(WORDS)})
    tuned = TunedLens.load(results()["tuned"].save(tmp_path / "tuned"))
    options = {"kind": "tuned", "site": "resid_post", "positions": None}
    found, wanted = (logit_lens(model, "a b c", translator=one, **options) for one in (tuned, results()["tuned"]))
    assert torch.equal(found.entropy, wanted.entropy)


@dataclass(frozen=True, eq=False)
class Everything(Result):
    """A result with every kind of value."""

    tensors: dict[str, Any]
    nested: tuple[Any, ...]
    schedule: LoopSchedule
    scalar: Tensor
    empty: Tensor


def test_every_kind_of_value_comes_back(tmp_path: Path) -> None:
    shared = torch.arange(6.0).reshape(2, 3)
    result = Everything(
        made_by={"none": None, "yes": True, "one": 1, "half": 0.5, "inf": float("inf"), "text": "ü\n\"'"},
        tensors={"a": shared, "b": shared.T, "c": [shared[0], {"d": torch.tensor([True, False])}]},
        nested=((1, [2, (3,)]), [], (), {}),
        schedule=LoopSchedule.looped(1, 2, 1, 3),
        scalar=torch.tensor(2.5, dtype=torch.bfloat16, requires_grad=True),
        empty=torch.zeros(0, 3, dtype=torch.int32),
    )
    found = Everything.load(result.save(tmp_path / "all"))
    for field in dataclasses.fields(Everything):
        wanted = getattr(result, field.name)
        assert_equal(getattr(found, field.name), wanted.detach() if isinstance(wanted, Tensor) else wanted, field.name)
    assert not found.scalar.requires_grad


@pytest.mark.parametrize(
    ("value", "message"),
    [(object(), "a object can't be kept in a result"), ({1: 2}, "dictionaries have strings as keys")],
)
def test_a_value_that_can_not_be_kept_is_a_mistake_of_the_class(value: Any, message: str, tmp_path: Path) -> None:
    result = dataclasses.replace(results()["curves"], made_by={"odd": value})
    with pytest.raises(TypeError, match=f"made_by.odd: .*{message}"):
        result.save(tmp_path / "odd")
    assert list(tmp_path.iterdir()) == []


def test_the_file_is_safetensors_that_says_what_it_is(tmp_path: Path) -> None:
    path = results()["curves"].save(tmp_path / "curves")
    with safe_open(path, framework="pt") as file:
        header, names = file.metadata(), set(file.keys())
    assert (header["format"], header["class"]) == ("tl_looped.result", "ExitCurves")
    assert names == {"threshold", "saved", "kl", "agreement"}


# What is no such file.


def test_files_that_are_no_results(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="can't be read as a result"):
        LogitLens.load(tmp_path / "missing")
    with pytest.raises(InputError, match="can't be read as a result"):
        LogitLens.load(tmp_path)
    (tmp_path / "text").write_text("not safetensors")
    with pytest.raises(InputError, match="text' can't be read as a result"):
        LogitLens.load(tmp_path / "text")
    whole = results()["lens"].save(tmp_path / "whole").read_bytes()
    (tmp_path / "cut").write_bytes(whole[:-10])
    with pytest.raises(InputError, match="cut' can't be read as a result"):
        LogitLens.load(tmp_path / "cut")
    for metadata in (None, {"format": "pt"}):
        save_file({"a": torch.zeros(2)}, tmp_path / "foreign", metadata=metadata)
        with pytest.raises(InputError, match="foreign' is a safetensors file, but not a result of tl_looped"):
            LogitLens.load(tmp_path / "foreign")


def test_the_result_of_another_class(tmp_path: Path) -> None:
    path = results()["lens"].save(tmp_path / "lens")
    with pytest.raises(InputError, match="holds a LogitLens, not a ExitTrace: call LogitLens.load"):
        ExitTrace.load(path)


def test_a_file_of_another_version(tmp_path: Path) -> None:
    @dataclass(frozen=True, eq=False)
    class ExitCurves(Result):
        """One that had another field."""

        n_loops: int

    path = ExitCurves(made_by={}, n_loops=3).save(tmp_path / "old")
    message = (
        "was written by another version of ExitCurves: it differs in agreement, kl, n_tokens, rules, saved, threshold"
    )
    with pytest.raises(InputError, match=message):
        type(results()["curves"]).load(path)


def test_a_file_that_can_not_be_written(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="there is no folder"):
        results()["curves"].save(tmp_path / "missing" / "file")
    with pytest.raises(InputError, match="is a folder"):
        results()["curves"].save(tmp_path)
