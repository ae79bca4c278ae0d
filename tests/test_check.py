"""`tl-looped check`: it passes on sound models, and every check fails on a model that is broken in its way."""

from collections.abc import Callable

import pytest
import torch
from helpers import FAMILIES, PARITY, make, parity, word_tokenizer

from tl_looped import InputError, LoopedModel
from tl_looped.__main__ import main
from tl_looped.engine.hooks import LoopHandle, SharedHookPoint
from tl_looped.report import check


def failed(model: LoopedModel) -> set[str]:
    """First words of the checks that fail."""
    return {" ".join(result.name.split()[:3]) for result in check(model) if not result.passed}


@pytest.mark.parametrize("family", FAMILIES)
def test_sound_models_pass(family: str):
    results = check(parity(family))
    assert [result for result in results if not result.passed] == []
    assert len(results) == 8


@pytest.mark.parametrize(
    "changes",
    [
        {"n_loops": 1},
        {"n_loops": 20, "injection": "add"},
        {"n_ctx": 1},
        {"dtype": torch.bfloat16, "n_coda": 1, "injection": "concat_linear", "state_init": "normal"},
        {"tokenizer": word_tokenizer()},
    ],
    ids=str,
)
def test_unusual_models_pass(changes: dict):
    assert failed(make(**changes)) == set()


def test_measures_are_told():
    measured = {result.name.split()[0]: result.measured for result in check(make(n_loops=3))}
    assert measured["every"].endswith("0 sites not as expected; 6 layer calls")
    assert "in 6 of 6 layer calls" in measured["attention"]
    assert measured["hooks"] == "0 of 288 logits changed"


def test_bad_loop_count_is_an_error():
    with pytest.raises(InputError, match="n_loops must be at least 1, got 0"):
        check(make(), n_loops=0)


Break = Callable[[LoopedModel, pytest.MonkeyPatch], None]


def skip_last_loop(model: LoopedModel, patch: pytest.MonkeyPatch) -> None:
    forward = model.transformer.forward
    patch.setattr(model.transformer, "forward", lambda t, f, s, start, stop: forward(t, f, s, start, stop - 1))


def reverse_layers(model: LoopedModel, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(model.transformer, "blocks", torch.nn.ModuleList(reversed(model.transformer.blocks)))


def inflate_patterns(model: LoopedModel, patch: pytest.MonkeyPatch) -> None:
    fire = SharedHookPoint.fire
    scale = {"hook_pattern": 1.1}
    patch.setattr(
        SharedHookPoint,
        "fire",
        lambda self, x, loop=None: fire(self, x * scale.get(self.name.rpartition(".")[2], 1.0), loop),
    )


def disturb_where_hooked(model: LoopedModel, patch: pytest.MonkeyPatch) -> None:
    fire = SharedHookPoint.fire
    patch.setattr(SharedHookPoint, "fire", lambda self, x, loop=None: (fire(self, x, loop)[0] * (1 + 1e-6), True))


def ignore_edits(model: LoopedModel, patch: pytest.MonkeyPatch) -> None:
    run = SharedHookPoint._run
    patch.setattr(SharedHookPoint, "_run", lambda self, x, loop: (run(self, x, loop), (x, False))[1])


def act_in_every_loop(model: LoopedModel, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(LoopHandle, "acts_at", lambda self, site: True)


def forget_given_states(model: LoopedModel, patch: pytest.MonkeyPatch) -> None:
    forward = model.transformer.forward
    patch.setattr(
        model.transformer,
        "forward",
        lambda t, f, s, start, stop: forward(t, f, torch.ones_like(s) if start else s, start, stop),
    )


def misread(model: LoopedModel, patch: pytest.MonkeyPatch) -> None:
    readout = model.readout
    patch.setattr(model, "readout", lambda *args, **options: readout(*args, **options) * 1.001)


def misread_early(model: LoopedModel, patch: pytest.MonkeyPatch) -> None:
    prepare = model.prepare

    def later(tokens: torch.Tensor, n_loops: int | None = None, **options: object) -> object:
        return prepare(tokens, None if n_loops == 2 else n_loops, **options)

    patch.setattr(model, "prepare", later)


def give_nan(model: LoopedModel, patch: pytest.MonkeyPatch) -> None:
    model.transformer.unembed.weight.data[0, 0] = float("nan")


def raise_at_readout(model: LoopedModel, patch: pytest.MonkeyPatch) -> None:
    def broken(*args: object) -> None:
        raise RuntimeError("mat1 and mat2\nshapes cannot be multiplied")

    patch.setattr(model.transformer, "readout", broken)


@pytest.mark.parametrize(
    ("breaks", "found"),
    [
        (skip_last_loop, {"every site fires", "attention patterns sum"}),
        (reverse_layers, {"every site fires"}),
        (inflate_patterns, {"attention patterns sum"}),
        (disturb_where_hooked, {"hooks that return"}),
        (ignore_edits, {"an edit in", "an edit outside"}),
        (act_in_every_loop, {"an edit in"}),
        (forget_given_states, {"a run stopped"}),
        (misread, {"the read-out of"}),
        (misread_early, {"the read-out of"}),
        (give_nan, {"hooks that return", "an edit in", "an edit outside", "a run stopped", "the read-out of"}),
        (raise_at_readout, {"every site fires", "hooks that return", "an edit in", "a run stopped", "the read-out of"}),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_broken_models_fail(breaks: Break, found: set[str], monkeypatch: pytest.MonkeyPatch):
    model = make(n_loops=3, n_prelude=1, injection="add")
    breaks(model, monkeypatch)
    assert found <= failed(model)


def test_an_exception_is_the_measure(monkeypatch: pytest.MonkeyPatch):
    model = make()
    raise_at_readout(model, monkeypatch)
    results = check(model)
    assert results[0].measured == "raised RuntimeError: mat1 and mat2 shapes cannot be multiplied"


def test_checks_leave_no_hook_and_no_gradient():
    model = make()
    check(model)
    assert not any(point.fwd_hooks or point.bwd_hooks for point in model.hook_dict.points())
    assert all(weight.grad is None for weight in model.parameters())


def test_command_prints_a_line_for_each_check(capsys: pytest.CaptureFixture[str]):
    assert main(["check", str(PARITY / "ouro")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line[:4] for line in lines[:-1]] == ["pass"] * 8
    assert lines[-1].endswith("8 of 8 checks passed")


def test_command_ends_with_one_when_a_check_fails(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    model = make()
    misread(model, monkeypatch)
    monkeypatch.setattr(LoopedModel, "from_pretrained", lambda name: model)
    assert main(["check", "some/model"]) == 1
    printed = capsys.readouterr().out
    assert "FAIL  the read-out of the last loop equals the logits: loop 1: off by 1.0e-03" in printed
    assert printed.splitlines()[-1] == "some/model: 6 of 8 checks passed"


def test_command_refuses_what_it_can_not_load(capsys: pytest.CaptureFixture[str], tmp_path: str):
    assert main(["check", str(tmp_path)]) == 2
    errors = capsys.readouterr().err.strip()
    assert errors == f"tl-looped: {tmp_path} has no config.json."
