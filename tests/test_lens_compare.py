"""Lenses side by side: each is what `logit_lens` says of it, the intervals are scipy's, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import TINY, TWO_STATES, WORDS, hook_count, make, tokens_for, word_tokenizer
from scipy.stats import bootstrap

from tl_looped import InputError, LoopedModel
from tl_looped.engine.numbers import interval
from tl_looped.lens import LensComparison, compare_lenses, fit_tuned_lens, jacobian_lens, logit_lens
from tl_looped.lens.reads import Translator
from tl_looped.observe import batch

TEXTS = ["a b c d e", "f", "g h a", "b c d"]
QUICK: dict[str, Any] = {"progress": False}
pytestmark = pytest.mark.filterwarnings("ignore:.*was trained with a prefix")


def reader(family: str = "huginn", **changes: Any) -> LoopedModel:
    return make(tokenizer=word_tokenizer(), **{**TINY[family], "d_vocab": len(WORDS), **changes})


def translators(model: LoopedModel, n_loops: Any = 3, **options: Any) -> list[Translator]:
    fitted = fit_tuned_lens(
        model, TEXTS, n_loops, held_out=TEXTS, steps=4, per_loop=True, learning_rate=1e-2, **QUICK, **options
    )
    return [fitted, jacobian_lens(model, TEXTS, n_loops, skip_first=0, **QUICK, **options)]


def test_each_is_what_the_logit_lens_says_of_it() -> None:
    """Prompt by prompt, so without padding; over the positions of each, then as they are."""
    model = reader()
    made = translators(model)
    found = compare_lenses(model, TEXTS, 3, translators=made, resamples=50, batch_size=2, **QUICK)
    assert found.kinds == ("exact", "direct", "tuned", "jacobian")
    for i, kind in enumerate(found.kinds):
        translator = made[i - 2] if i >= 2 else None
        for row, text in enumerate(TEXTS):
            one = logit_lens(model, text, 3, kind=kind, translator=translator, site="resid_post", positions=None)
            ranks = one.rank_trajectory()
            for measure, each in ((found.same_top, ranks == 0), (found.kl, one.kl_to_final), (found.rank, ranks)):
                wanted = each[:, :, 0].double().mean(-1)
                torch.testing.assert_close(measure[i, ..., row], wanted, rtol=1e-4, atol=1e-7)
    assert hook_count(model) == 0


def test_what_leaves_the_last_layer_is_what_the_run_says() -> None:
    """No lens has anything to add there: all agree with the run, in every prompt."""
    model = reader("ouro")
    found = compare_lenses(model, TEXTS, 3, translators=[translators(model)[1]], loops=[2], layers=[1], **QUICK)
    assert bool((found.same_top == 1).all()) and bool((found.rank == 0).all())
    torch.testing.assert_close(found.kl, torch.zeros_like(found.kl), rtol=0, atol=1e-9)
    assert bool((found.low[0] == 1).all()) and bool((found.high[2] == 0).all())


def test_intervals_are_scipys() -> None:
    model = reader()
    found = compare_lenses(model, TEXTS, 2, resamples=300, bootstrap_seed=4, **QUICK)
    for measure, (values, low, high) in enumerate(
        zip((found.same_top, found.kl, found.rank), found.low, found.high, strict=True)
    ):
        for place in np.ndindex(values.shape[:3]):
            each = values[place].numpy()
            theirs = bootstrap(
                (each,), np.mean, n_resamples=300, method="percentile", rng=np.random.default_rng(4)
            ).confidence_interval
            if len(set(each.tolist())) > 1:  # of numbers all alike scipy's is what rounding makes of them
                assert [float(low[place]), float(high[place])] == pytest.approx([theirs.low, theirs.high]), measure
    alike = interval(torch.full((2, 7), 0.1).double(), 100, 0)
    assert all(torch.equal(end, torch.full((2,), 0.1).double()) for end in alike)


def test_of_one_position_of_the_state_and_of_two_stacks() -> None:
    model = reader()
    found = compare_lenses(model, TEXTS, 3, kinds=["coda"], site="state", loops=[0, -1], positions=-1, **QUICK)
    for row, text in enumerate(TEXTS):
        one = logit_lens(model, text, 3, kind="exact", loops=[0, 2])
        torch.testing.assert_close(found.kl[0, :, 0, row], one.kl_to_final[:, 0, 0].double(), rtol=1e-4, atol=1e-7)
    stacks = make(**TWO_STATES)
    tokens = tokens_for(stacks)
    kinds = {stack: compare_lenses(stacks, tokens, 2, stack=stack, **QUICK).kinds for stack in stacks.cfg.looping}
    assert kinds == {"L_blocks": ("direct",), "H_blocks": ("exact", "direct")}


def test_pieces_of_the_vocabulary_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model = reader()
    whole = compare_lenses(model, TEXTS, 3, **QUICK)
    monkeypatch.setattr(batch, "CHUNK", 2 * model.cfg.d_vocab)
    pieces = compare_lenses(model, TEXTS, 3, **QUICK)
    for name in ("same_top", "kl", "rank", "low", "high"):
        torch.testing.assert_close(getattr(pieces, name), getattr(whole, name), rtol=1e-4, atol=1e-6)


def test_its_table_figure_and_file(tmp_path: Path) -> None:
    model = reader()
    found = compare_lenses(model, TEXTS, 3, layers=[1, 0], **QUICK)
    table = found.to_dataframe()
    assert list(table) == ["lens", "loop", "layer"] + [
        f"{name}{end}" for name in ("same_top", "kl", "rank") for end in ("", "_low", "_high")
    ]
    row = table[(table["lens"] == "direct") & (table["loop"] == 2) & (table["layer"] == 0)].iloc[0]
    assert row["kl"] == pytest.approx(float(found.kl[1, 2, 1].mean()))
    assert row["kl_low"] == pytest.approx(float(found.low[1, 1, 2, 1])) and row["kl_low"] <= row["kl"] <= row["kl_high"]
    lines = found.plot().to_dict()["data"]
    assert [line["name"] for line in lines] == ["exact"] * 3 + ["direct"] * 3
    assert lines[4]["y"] == pytest.approx(found.kl[1].mean(-1).flatten().tolist(), rel=1e-4)
    assert lines[4]["customdata"][:3] == ["loop 0, layer 1", "loop 0, layer 0", "loop 1, layer 1"]
    above = [y + more for y, more in zip(lines[4]["y"], lines[4]["error_y"]["array"], strict=True)]
    assert above == pytest.approx(found.high[1, 1].flatten().tolist(), rel=1e-3)
    again = LensComparison.load(found.save(tmp_path / "comparison"))
    assert torch.equal(again.kl, found.kl) and again.kinds == found.kinds
    assert "layer" not in compare_lenses(model, TEXTS, 3, site="state", **QUICK).to_dataframe()


@pytest.mark.usefixtures("as_a_user")
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kinds": []}, r"name one lens or more, each once, with kinds= and translators=, got \[\]"),
        ({"kinds": ["direct", "direct"]}, r"each once, .*, got \['direct', 'direct'\]"),
        (
            {"kinds": ["jacobian"]},
            r"kind 'jacobian' is that of a translator: pass .*=\[jacobian_lens\(...\)\]",
        ),
        ({"kinds": ["logit"]}, "kind must be one of 'exact', .*, got 'logit'"),
        ({"kinds": ["coda"]}, "custom has no coda"),
        ({"translators": ["tuned"]}, r"translators must be a list of TunedLens and JacobianLens, got \['tuned'\]"),
        ({"resamples": 0}, "resamples must be at least 1, got 0"),
        ({"bootstrap_seed": -1}, "bootstrap_seed must be at least 0, got -1"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"positions": 1}, "position 1 is out of range: 1 exist"),
        ({"loops": [4]}, "loop 4 is out of range"),
    ],
)
def test_bad_input_is_refused_before_the_first_run(options: dict[str, Any], message: str) -> None:
    model = reader("ouro")
    ran: list[str] = []
    hook = ("hook_embed", lambda x, hook: ran.append(hook.name))
    with model.hooks([hook]), pytest.raises(InputError, match=message):
        compare_lenses(model, TEXTS, **{**QUICK, **options})
    assert ran == []


@pytest.mark.usefixtures("as_a_user")
def test_a_translator_of_another_site_or_loop_count() -> None:
    model = reader()
    made = translators(model, layers=[0])
    with pytest.raises(InputError, match="translators must be a list of TunedLens and JacobianLens, got TunedLens"):
        compare_lenses(model, TEXTS, 3, translators=made[0], **QUICK)  # pyright: ignore[reportArgumentType]
    with pytest.raises(InputError, match="reads 'resid_post', not 'state'"):
        compare_lenses(model, TEXTS, 3, site="state", translators=made, **QUICK)
    with pytest.raises(InputError, match="fitted on runs of 3 loops, this one has 2"):
        compare_lenses(model, TEXTS, 2, translators=made, layers=[0], **QUICK)
    with pytest.raises(InputError, match=r"the translator has the layers \[0\], not \[1\]"):
        compare_lenses(model, TEXTS, 3, translators=made, **QUICK)
    with torch.no_grad():
        broken = reader()
        broken.transformer.unembed.weight[3] = float("nan")
    with pytest.raises(InputError, match="the read-out of 'blocks.0.loop.0.hook_resid_post' is not a number"):
        compare_lenses(broken, TEXTS, 3, **QUICK)
