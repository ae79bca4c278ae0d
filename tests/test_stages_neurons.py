"""Prediction and suppression neurons: moments by hand, and directions made to have them."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import TINY, make, tiny
from test_unrolled import bridge, looped
from torch import Tensor

from tl_looped.engine.errors import InputError
from tl_looped.stages import NeuronShares, logit_effects, neuron_shares
from tl_looped.stages import neurons as module
from tl_looped.stages.neurons import largest_kurtosis


def moments(values: list[float]) -> tuple[float, float, float, float]:
    """(mean, variance, skew, kurtosis), straight from their definitions."""
    n = len(values)
    mean = sum(values) / n
    second, third, fourth = (sum((v - mean) ** power for v in values) / n for power in (2, 3, 4))
    return mean, second, third / second**1.5, fourth / second**2


def effects(w: Tensor, W_U: Tensor, unit: bool) -> list[float]:
    found = []
    for token in range(W_U.shape[1]):
        product = sum(float(w[i]) * float(W_U[i, token]) for i in range(len(w)))
        norms = math.sqrt(float(w @ w)) * math.sqrt(float(W_U[:, token] @ W_U[:, token]))
        found.append(product / norms if unit else product)
    return found


@pytest.mark.parametrize("unit", [True, False])
def test_moments_against_loops_over_single_numbers(unit: bool, monkeypatch: pytest.MonkeyPatch):
    w, W_U = torch.randn(5, 4, dtype=torch.float64), torch.randn(4, 11, dtype=torch.float64) + 0.5
    whole = logit_effects(w, W_U, unit)
    for neuron in range(5):
        expected = moments(effects(w[neuron], W_U, unit))
        assert [float(moment[neuron]) for moment in whole] == pytest.approx(expected, abs=1e-10)
    monkeypatch.setattr(module, "_CHUNK", 15)  # three tokens at a time
    for ours, theirs in zip(logit_effects(w, W_U, unit), whole, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_closed_forms():
    n = 50
    W_U = torch.eye(n, dtype=torch.float64)
    alternating = torch.tensor([1.0, -1.0] * (n // 2), dtype=torch.float64)
    single = torch.zeros(n, dtype=torch.float64)
    single[7] = 2.0
    found = logit_effects(torch.stack([alternating, single, -single]), W_U)
    assert found.kurtosis.tolist() == pytest.approx([1, largest_kurtosis(n), largest_kurtosis(n)])
    share = 1 / n  # one of n tokens: a Bernoulli variable
    skew = (1 - 2 * share) / math.sqrt(share * (1 - share))
    assert found.skew.tolist() == pytest.approx([0, skew, -skew])
    assert largest_kurtosis(n) == pytest.approx((1 - 3 * share + 3 * share**2) / (share * (1 - share)))


def test_a_normal_effect_has_kurtosis_three():
    found = logit_effects(torch.eye(2), torch.randn(2, 200_000), unit=False)
    assert found.kurtosis.tolist() == pytest.approx([3, 3], abs=0.1)
    assert found.skew.tolist() == pytest.approx([0, 0], abs=0.05)


def test_neurons_without_an_effect_are_no_number():
    w = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    W_U = torch.stack([torch.full((30,), 0.7), torch.randn(30)])
    found = logit_effects(w, W_U, unit=False)
    assert found.kurtosis.isnan().tolist() == [True, True, False]
    assert found.skew.isnan().tolist() == [True, True, False]
    same = torch.randn(64, 1).expand(-1, 30)
    assert bool(logit_effects(torch.randn(9, 64), same).kurtosis.isnan().all())  # rounding has no shape


def test_half_precision_weights_are_measured_in_float32():
    w, W_U = torch.randn(3, 8), torch.randn(8, 40)
    found = logit_effects(w.bfloat16(), W_U.bfloat16())
    torch.testing.assert_close(found.kurtosis, logit_effects(w.bfloat16().float(), W_U.bfloat16().float()).kurtosis)


def folded(model: Any, block: Any) -> tuple[Tensor, Tensor]:
    """(directions, unembedding) with the norms' weights in them, entry by entry."""
    w, W_U = block.mlp.W_out.clone(), model.W_U.clone()
    for i in range(model.cfg.d_model):
        if model.cfg.norm_placement != "pre":
            w[:, i] *= block.ln2_post.weight[i]
        if model.cfg.final_norm or model.cfg.loop_norm == "each":
            W_U[i] *= model.transformer.ln_final.weight[i]
    return w.detach().double(), W_U.detach().double()


@pytest.mark.parametrize("family", TINY)
def test_shares_of_a_model_are_counted_by_hand(family: str):
    model = tiny(family, torch.float64)
    result = neuron_shares(model, min_kurtosis=3.0, min_skew=0.2)
    stacks = {"prelude": model.transformer.prelude, "blocks": model.transformer.blocks, "coda": model.transformer.coda}
    rows = [(stack, layer, block) for stack, blocks in stacks.items() for layer, block in enumerate(blocks)]
    assert list(zip(result.stacks, result.layers, strict=True)) == [(stack, layer) for stack, layer, _ in rows]
    for row, (_, _, block) in enumerate(rows):
        w, W_U = folded(model, block)
        found = [moments(effects(w[neuron], W_U, unit=True)) for neuron in range(model.cfg.d_mlp)]
        assert result.kurtosis[row].tolist() == pytest.approx([one[3] for one in found])
        assert result.skew[row].tolist() == pytest.approx([one[2] for one in found])
        up = sum(one[3] > 3 and one[2] > 0.2 for one in found) / len(found)
        down = sum(one[3] > 3 and one[2] < -0.2 for one in found) / len(found)
        assert [float(result.prediction()[row]), float(result.suppression()[row])] == pytest.approx([up, down])


def test_a_feedforward_model_with_the_same_weights_has_the_same_neurons():
    """Six layers of transformers' Llama are our prelude, two core layers twice, and coda."""
    control, result = bridge(folded=True), neuron_shares(looped(), min_kurtosis=2.0)
    for layer, row in enumerate((0, 1, 2, 1, 2, 3)):
        found = logit_effects(control.W_out[layer], control.W_U)
        torch.testing.assert_close(found.kurtosis, result.kurtosis[row], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(found.skew, result.skew[row], rtol=1e-4, atol=1e-4)


def test_the_norms_weights_count_only_where_they_are_folded():
    model = tiny("ouro")
    plain = neuron_shares(model, fold=False)
    expected = logit_effects(model.transformer.blocks[1].mlp.W_out, model.W_U)
    torch.testing.assert_close(plain.kurtosis[1], expected.kurtosis)
    assert not torch.allclose(plain.kurtosis, neuron_shares(model).kurtosis)


def test_neurons_made_to_predict_and_to_suppress():
    model = make(d_vocab=40, d_model=40, n_heads=4, d_head=4)
    with torch.no_grad():
        model.transformer.unembed.weight.copy_(torch.eye(40))
        model.transformer.ln_final.weight.fill_(1)
        down = model.transformer.blocks[1].mlp.down.weight  # [d_model, d_mlp]
        down.copy_(torch.tensor([1.0, -1.0] * 20)[:, None].expand(-1, 12))
        down[:, :4] = 0
        down[5, 0], down[6, 1], down[7, 2], down[8, 3] = 1.0, 0.1, 9.0, -1.0
    table = neuron_shares(model).to_dataframe()
    assert table.loc[1, "prediction"] == 3 / 12 and table.loc[1, "suppression"] == 1 / 12


def test_random_neurons_are_not_beyond_random_directions_and_made_ones_are():
    model = make(d_vocab=400, d_model=16, n_heads=4, d_head=4, d_mlp=2000)
    with torch.no_grad():
        W_U = model.transformer.unembed.weight  # 392 tokens much alike and 8 others: a heavy tail of every direction
        W_U.copy_(torch.randn(W_U.shape, generator=torch.Generator().manual_seed(3)))
        W_U[8:] = W_U[8:] / 10 + W_U[8]
        down = model.transformer.blocks[0].mlp.down.weight
        down.copy_(torch.randn(down.shape, generator=torch.Generator().manual_seed(4)))
    found = neuron_shares(model, min_kurtosis=None, n_random=4000)
    row = found.stacks.index("blocks")
    assert float(found.beyond_random()[row]) == pytest.approx(0.01, abs=0.006)
    both = found.prediction() + found.suppression()
    torch.testing.assert_close(both, found.beyond_random())
    by_the_source = neuron_shares(model)
    assert float((by_the_source.prediction() + by_the_source.suppression())[row]) > 0.3  # and all of it is chance
    with torch.no_grad():
        one_each = torch.linalg.pinv(W_U[:9])[:, :8]  # a direction for each of 8 tokens that the others do not see
        down[:, :200] = one_each.repeat(1, 25)
    assert float(neuron_shares(model).beyond_random()[row]) > 0.03
    assert torch.equal(neuron_shares(model).random, neuron_shares(model).random)
    assert not torch.equal(neuron_shares(model).random, neuron_shares(model, seed=1).random)


def test_random_directions_by_a_plain_computation():
    model = tiny("ouro", torch.float64)
    found, generator = neuron_shares(model, n_random=100, seed=5), torch.Generator().manual_seed(5)
    drawn = torch.randn(100, model.cfg.d_model, generator=generator).double()
    for row, block in enumerate(model.transformer.blocks):
        _, W_U = folded(model, block)
        read = drawn * block.ln2_post.weight.detach().double()
        assert found.random[row].tolist() == pytest.approx([moments(effects(w, W_U, unit=True))[3] for w in read])
        ordered = found.random[row].sort().values
        assert float(ordered[98]) <= float(found.to_dataframe()["random_99"][row]) <= float(ordered[99])


def test_none_that_qualifies_is_said():
    found = neuron_shares(tiny("llama"), min_kurtosis=20.0)
    assert "No neuron has a kurtosis above 20; the largest is " in repr(found)
    assert "No neuron has a kurtosis above 20" in found.plot().layout.title.text


def test_tables_figure_and_file(tmp_path: Path):
    model = tiny("huginn")
    result = neuron_shares(model, min_kurtosis=2.5)
    table, every = result.to_dataframe(), result.neurons()
    assert table["stack"].tolist() == ["prelude", "blocks", "blocks", "coda"] and len(every) == 4 * 12
    assert every.loc[25, "kurtosis"] == float(result.kurtosis[2, 1])
    up, down, beyond = result.plot().data
    assert list(beyond.y) == pytest.approx(table["beyond_random"].tolist(), rel=1e-4)
    assert list(up.y) == pytest.approx(result.prediction().tolist(), rel=1e-4)
    assert list(down.y) == pytest.approx(result.suppression().tolist(), rel=1e-4)
    assert list(up.customdata) == ["prelude 0", "core 0", "core 1", "coda 0"]
    loaded = NeuronShares.load(result.save(tmp_path / "neurons"))
    assert torch.equal(loaded.prediction(), result.prediction()) and loaded.stacks == result.stacks


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"min_kurtosis": -1.0}, "min_kurtosis must be a finite number of at least 0, got -1.0"),
        ({"min_skew": float("nan")}, "min_skew must be a finite number"),
        ({"min_kurtosis": True}, "min_kurtosis must be a finite number"),
        ({"n_random": 10}, "n_random must be at least 100, got 10"),
        ({"min_kurtosis": 40.0}, "with 24 tokens no neuron's kurtosis exceeds 22.*pass a smaller min_kurtosis"),
    ],
)
@pytest.mark.usefixtures("as_a_user")
def test_thresholds_that_are_refused(options: dict[str, Any], message: str):
    with pytest.raises(InputError, match=message):
        neuron_shares(tiny("llama"), **options)


@pytest.mark.usefixtures("as_a_user")
def test_weights_that_do_not_fit():
    with pytest.raises(InputError, match="directions are 5 wide and W_U reads 4"):
        logit_effects(torch.ones(3, 5), torch.ones(4, 9))
    with pytest.raises(InputError, match="two tokens or more, got 1"):
        logit_effects(torch.ones(3, 4), torch.ones(4, 1))


@pytest.mark.parametrize("part", ["directions", "W_U"])
def test_weights_that_are_not_finite_are_no_zero_share(part: str):
    weights = {"directions": torch.randn(3, 4), "W_U": torch.randn(4, 9)}
    weights[part][1, 2] = float("nan")
    with pytest.raises(InputError, match="effects on the logits are not finite"):
        logit_effects(**weights)
