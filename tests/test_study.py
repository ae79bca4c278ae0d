"""The architecture study, small: its cells against a plain computation, its claims, its files."""

from __future__ import annotations

import csv
import dataclasses
import math
import statistics
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tl_looped import LoopedModel
from tl_looped.__main__ import main
from tl_looped.claims import ArchitectureStudy, architecture, architectures, initialise, study_architectures
from tl_looped.claims.architectures import DEGENERATE, DISTINCT, NONE, REPORTED, Sizes, _measure
from tl_looped.engine.errors import InputError

SIZES = Sizes(d_model=16, n_heads=2, prompts=2, pos=5)
LOOPS = 16
LIMITS = {"tolerance": 1e-2, "hold": 0.25, "threshold": 0.99, "share": 0.9}


@lru_cache
def study() -> ArchitectureStudy:
    return study_architectures((2, 3), 2, LOOPS, ["huginn"], input_scales=[None], sizes=SIZES, progress=False)


# What it runs.


def test_a_cell_for_each_architecture_initialisation_and_seed() -> None:
    cells = study().cells
    keys = [(c["initialisation"], c["norm"], c["injection"], c["layers"], c["seed"]) for c in cells]
    assert len(set(keys)) == len(keys) == 3 * 2 * 2 * 2
    assert study().distances.shape == (24, LOOPS) and bool(study().distances.isfinite().all())
    assert float(study().distances[:, -1].abs().max()) == 0 and float(study().distances[:, 0].min()) > 0


@pytest.mark.parametrize("index", [0, 6, 11, 23])
def test_a_cell_equals_a_plain_computation(index: int) -> None:
    cell = study().cells[index]
    cfg = architecture(cell["layers"], cell["norm"], cell["injection"], cell["initialisation"], SIZES, LOOPS)
    model = LoopedModel.from_config(cfg)
    initialise(model, cell["initialisation"], cell["seed"])
    tokens = torch.randint(256, (2, 5), generator=torch.Generator().manual_seed(0))
    _, cache = model.run_with_cache(tokens, **({"seed": cell["seed"]} if cell["injection"] else {}))
    states = cache.stack("resid_post")
    end = states[-1]
    for t in range(LOOPS):
        values = [
            float((states[t, layer, b, p] - end[layer, b, p]).norm() / end[layer, b, p].norm())
            for layer in range(cell["layers"])
            for b in range(2)
            for p in range(5)
        ]
        assert float(study().distances[index, t]) == pytest.approx(sum(values) / len(values), rel=1e-4, abs=1e-6)
        middle = statistics.median(values)
        assert float(study().medians[index, t]) == pytest.approx(middle, rel=1e-4, abs=1e-6)
    smallest = [
        min(float(torch.cosine_similarity(end[0, b, p], end[k, b, p], dim=0)) for k in range(1, cell["layers"]))
        for b in range(2)
        for p in range(5)
    ]
    assert cell["smallest_cosine"] == pytest.approx(statistics.median(smallest), abs=1e-5)
    written = sum(cache[name, layer, 0] for name in ("attn_out", "mlp_out") for layer in range(cell["layers"]))
    read = cache["resid_pre", 0, 0]
    assert cell["writes"] == pytest.approx(float(written.norm(dim=-1).mean() / read.norm(dim=-1).mean()), rel=1e-5)
    norms = states[:, -1].norm(dim=-1).mean((1, 2))
    assert cell["growth"] == pytest.approx(float(norms[-1] / norms[0]), rel=1e-4)


@pytest.mark.parametrize("norm", ["pre", "residual_sandwich", "output_sandwich"])
@pytest.mark.parametrize("injection", [True, False])
def test_architectures_are_what_they_are_called(norm: Any, injection: bool) -> None:
    cfg = architecture(4, norm, injection, "fan_in", SIZES)
    assert (cfg.n_prelude, cfg.n_core, cfg.n_coda, cfg.n_loops, cfg.norm_placement) == (0, 4, 0, 128, norm)
    assert cfg.injection == ("concat_linear" if injection else "none")
    assert cfg.state_init == ("truncated_normal" if injection else "prelude")
    assert cfg.loop_norm == ("each" if norm == "output_sandwich" else "none")


def test_initialisations() -> None:
    sizes = Sizes(d_model=128, n_heads=4)

    def weights(how: Any, seed: int = 0) -> dict[str, Tensor]:
        model = LoopedModel.from_config(architecture(2, "residual_sandwich", True, how, sizes))
        initialise(model, how, seed)
        return {name: weight.detach() for name, weight in model.transformer.named_parameters()}

    spread = math.sqrt(2 / (5 * 128))
    expected = {
        "huginn": {
            "embed.weight": spread,
            "injection.weight": spread,
            "blocks.1.attn.q.weight": spread,
            "blocks.1.attn.o.weight": spread / math.sqrt(2 * 2 * 32),
            "blocks.0.mlp.down.weight": spread / math.sqrt(2 * 2 * 32),
        },
        "fan_in": {"embed.weight": 1.0, "injection.weight": 1 / 16, "blocks.1.attn.o.weight": 1 / math.sqrt(128)},
        "normal": {"embed.weight": 0.02, "injection.weight": 0.02, "blocks.0.mlp.down.weight": 0.02},
    }
    for how, stds in expected.items():
        found, again, other = weights(how), weights(how), weights(how, seed=1)
        for name, std in stds.items():
            assert float(found[name].std()) == pytest.approx(std, rel=0.05)
            assert torch.equal(found[name], again[name]) and not torch.equal(found[name], other[name])
        assert all(bool((weight == 1).all()) for name, weight in found.items() if "ln" in name)
    assert architecture(2, "pre", True, "huginn", sizes).embed_scale == pytest.approx(math.sqrt(128))


@pytest.mark.parametrize("how", ["huginn", "fan_in", "normal"])
def test_an_input_scale_is_the_size_of_embedding_and_state(how: Any) -> None:
    sizes = Sizes(d_model=128, n_heads=4)
    for injection in (True, False):
        model = LoopedModel.from_config(architecture(2, "pre", injection, how, sizes, 16, 0.5))
        initialise(model, how, 0)
        _, cache = model.run_with_cache(torch.arange(200).reshape(-1, 10), n_loops=1, seed=0 if injection else None)
        for name in ("embed", "state_init"):
            assert float(cache[name].square().mean().sqrt()) == pytest.approx(0.5, rel=0.05), name


# What it says.


def states(kind: str, layers: int = 3, tokens: int = 4) -> Tensor:
    """[loop, layer, token, d_model] with a known end."""
    t = torch.arange(64.0)[:, None, None, None]
    points = torch.randn(layers, tokens, 8, generator=torch.Generator().manual_seed(0))
    if kind in ("degenerate", "drifts"):
        points = points[:1].expand(layers, tokens, 8)
    start = torch.randn(layers, tokens, 8, generator=torch.Generator().manual_seed(1))
    if kind == "drifts":
        return start + t * points
    if kind == "moves":
        return torch.randn(64, layers, tokens, 8, generator=torch.Generator().manual_seed(2))
    return points + start * 0.6**t


@pytest.mark.parametrize(
    ("kind", "verdict", "converged"),
    [("distinct", DISTINCT, 1.0), ("degenerate", DEGENERATE, 1.0), ("drifts", NONE, 0.0), ("moves", NONE, 0.0)],
)
def test_verdicts_on_constructed_states(kind: str, verdict: str, converged: float) -> None:
    found, distances = _measure(states(kind), LIMITS)
    assert found["verdict"] == verdict and found["converged"] == converged
    assert distances.shape == (64, 3, 4) and float(distances[-1].abs().max()) == 0
    if kind == "drifts":
        assert found["smallest_cosine"] > 0.99 and found["growth"] > 10
    assert math.isnan(found["loop"]) == (converged == 0)


def test_a_share_of_layers_and_tokens_must_have_come_to_rest() -> None:
    mixed = states("distinct")
    mixed[:, 1, 2] = states("moves")[:, 1, 2]  # one series of twelve
    assert _measure(mixed, LIMITS)[0]["converged"] == pytest.approx(11 / 12)
    assert _measure(mixed, LIMITS)[0]["verdict"] == DISTINCT
    assert _measure(mixed, {**LIMITS, "share": 0.95})[0]["verdict"] == NONE


def test_claims_count_the_models_that_show_what_the_paper_reports() -> None:
    given = study()
    verdicts = {("pre", True): DISTINCT, ("residual_sandwich", True): NONE, ("pre", False): DISTINCT}
    cells = [
        {**cell, "verdict": verdicts.get((cell["norm"], cell["injection"]), NONE)} if cell["seed"] == 0
        else {**cell, "verdict": DEGENERATE}
        for cell in given.cells
    ]  # fmt: skip
    claims = dataclasses.replace(given, cells=tuple(cells)).claims("huginn").set_index(["injection", "norm"])
    assert set(claims["cells"]) == {4} and len(claims) == len(REPORTED) == 6
    agrees = {key: int(claims.loc[key, "agrees"]) for key in claims.index}
    assert agrees == {
        (True, "pre"): 4,
        (True, "residual_sandwich"): 2,
        (True, "output_sandwich"): 2,
        (False, "pre"): 2,
        (False, "residual_sandwich"): 2,
        (False, "output_sandwich"): 2,
    }
    assert claims.loc[(False, "pre"), "found"] == f"{DISTINCT} (2 of 4); {DEGENERATE} (2 of 4)"


def test_seeds_are_taken_together() -> None:
    summary = study().summary("huginn")
    assert len(summary) == 12
    row = summary.query("norm == 'pre' and injection and layers == 3").iloc[0]
    cells = [
        cell
        for cell in study().cells
        if (cell["initialisation"], cell["norm"], cell["injection"], cell["layers"]) == ("huginn", "pre", True, 3)
    ]
    assert len(cells) == 2
    assert row["growth"] == pytest.approx(sum(cell["growth"] for cell in cells) / 2)
    assert (row["cosine_low"], row["cosine_high"]) == tuple(sorted(cell["smallest_cosine"] for cell in cells))


def test_the_figure_has_a_panel_for_each_kind_and_a_line_for_each_model() -> None:
    figure = study().plot("huginn")
    assert len(figure.data) == 24
    titles = [note.text for note in figure.layout.annotations]
    assert len(titles) == 6 and {"pre, with injection", "output_sandwich, without injection"} <= set(titles)
    assert sum(bool(trace.showlegend) for trace in figure.data) == 2  # layers
    first = study().of("huginn")[0]
    drawn = torch.tensor(figure.data[0].y[:-1], dtype=torch.float32)
    torch.testing.assert_close(drawn, study().medians[first, :-1], rtol=1e-4, atol=0)
    assert figure.data[0].y[-1] is None  # zero has no place on a logarithmic axis
    with pytest.raises(
        InputError, match=r"no initialisation 'zeros' with input_scale=None, but \[\('huginn', None\)\]"
    ):
        study().plot("zeros")


def test_a_study_is_kept_in_a_file(tmp_path: Path) -> None:
    again = ArchitectureStudy.load(study().save(tmp_path / "study"))
    assert again.claims("huginn").equals(study().claims("huginn")) and torch.equal(again.distances, study().distances)


def test_what_decides_is_told_by_the_writes() -> None:
    cell = study().cells[0]
    given = [(0.1, 1.0), (0.2, 0.95), (0.4, 0.2), (0.5, 1.0), (0.9, 0.0)]
    cells = tuple({**cell, "writes": writes, "converged": converged} for writes, converged in given)
    (row,) = dataclasses.replace(study(), cells=cells).decides().to_dict("records")
    assert (row["models"], row["at_rest"], row["rest_up_to"], row["none_from"]) == (5, 3, 0.2, 0.9)
    assert row["auc"] == pytest.approx(5 / 6)  # of the six pairs only (0.4, 0.5) is the wrong way round
    (row,) = dataclasses.replace(study(), cells=cells[:2]).decides().to_dict("records")
    assert row["rest_up_to"] == 0.2 and math.isnan(row["none_from"]) and math.isnan(row["auc"])


def test_a_study_that_was_interrupted_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options: dict[str, Any] = {"layers": (2,), "seeds": 1, "n_loops": 16, "initialisations": ["normal"]}
    options |= {"sizes": SIZES, "progress": False}
    whole, file, left = study_architectures(**options), tmp_path / "new" / "kept.safetensors", iter(range(5))
    real = architectures.initialise

    def stop(*args: Any) -> None:
        if next(left, None) is None:
            raise KeyboardInterrupt
        real(*args)

    monkeypatch.setattr(architectures, "initialise", stop)
    with pytest.raises(KeyboardInterrupt):
        study_architectures(**options, out=file)
    assert len(ArchitectureStudy.load(file).cells) == 5
    monkeypatch.setattr(architectures, "initialise", real)
    again = study_architectures(**options, out=file)
    assert again.to_dataframe().equals(whole.to_dataframe()) and len(whole.cells) == 12
    with pytest.raises(InputError, match=r"holds a study with other seeds, input_scales: give out= another file"):
        study_architectures(**{**options, "seeds": 2}, input_scales=[0.5], out=file)


# Bad input.


@pytest.mark.usefixtures("as_a_user")
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layers": ()}, r"layers must be a list of one value or more, each once, got \[\]"),
        ({"layers": (2, 2)}, "layers must be a list of one value or more, each once"),
        ({"layers": (1,)}, "layers must be at least 2, got 1"),
        ({"seeds": 0}, "seeds must be at least 1, got 0"),
        ({"n_loops": 15}, "n_loops must be at least 16, got 15"),
        ({"input_scales": [0.0]}, "an input scale must be a finite number above 0, got 0"),
        ({"input_scales": [1.0, 1.0]}, "input_scales must be a list of one value or more, each once"),
        ({"initialisations": ["zeros"]}, "initialisations must be of .*, got 'zeros'"),
        ({"tolerance": 0}, "tolerance must be a finite number above 0"),
        ({"share": 1.5}, "share must be a number above 0 and at most 1"),
    ],
)
def test_bad_input_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        study_architectures(**options)


def test_sizes_that_do_not_fit() -> None:
    with pytest.raises(InputError, match="d_model 18 must be a multiple of twice n_heads, 8"):
        Sizes(d_model=18)


# The command.


def test_the_command_writes_table_and_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--layers", "2", "--seeds", "1", "--n-loops", "16", "--init", "huginn", "normal"]
    tmp_path = tmp_path / "new"
    assert main(["study", "architectures", *options, "--out", str(tmp_path)]) == 0
    with open(tmp_path / "architectures.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 24 and {row["input_scale"] for row in rows} == {"", "1.0"}
    assert {row["initialisation"] for row in rows} == {"huginn", "normal"}
    for row in rows:
        assert row["verdict"] in (DISTINCT, DEGENERATE, NONE) and -1 <= float(row["smallest_cosine"]) <= 1.00001
        assert float(row["distance_15"]) == 0 and float(row["distance_0"]) > 0 and "distance_16" not in row
        assert float(row["median_0"]) > 0
    html = (tmp_path / "architectures.html").read_text(encoding="utf-8")
    for text in (
        "Initialisation: huginn",
        "Initialisation: normal, inputs of scale 1",
        "What decides",
        "the paper reports",
        "--n-loops 16",
    ):
        assert text in html
    assert "Initialisation: fan_in" not in html and html.count('<div class="plot">') == 4
    assert "default-src 'none'" in html  # the page fetches nothing
    out = capsys.readouterr().out
    assert out.count("Wrote") == 2 and "fixed point, degenerate" in out


def test_the_command_refuses_before_it_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").touch()
    assert main(["study", "architectures", "--out", str(tmp_path / "file")]) == 2
    assert "can't be written" in capsys.readouterr().err
    (tmp_path / "file").unlink()
    assert main(["study", "architectures", "--input-scale", "big", "--out", str(tmp_path)]) == 2
    assert "--input-scale must be own or a number above 0, got 'big'" in capsys.readouterr().err
    assert main(["study", "architectures", "--n-loops", "2", "--out", str(tmp_path)]) == 2
    assert "n_loops must be at least 16, got 2" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
