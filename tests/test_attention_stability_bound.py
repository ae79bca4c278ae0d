"""Proposition 4.2: the inequality under its own assumptions, never violated; and what is seen beside it."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import FAMILIES, TINY, make, parity, run_options, tiny, tokens_for
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tl_looped import LoopedModel, Rotary
from tl_looped.attention import AttentionBound, attention_bound, attention_stability
from tl_looped.attention.bound import _rotary_bound, pattern_bound, plain_pattern, score_norm
from tl_looped.engine.errors import InputError
from tl_looped.nn.rotary import component_frequencies, rotary_angles, rotate

SLACK = 1 + 1e-9  # of float64


def draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def weights(seed: int, heads: int, kv: int, d_model: int, d_head: int) -> tuple[Tensor, Tensor]:
    return draw(seed, heads, d_model, d_head), draw(seed + 1, kv, d_model, d_head)


def change(a: Tensor, b: Tensor) -> Tensor:
    return torch.linalg.matrix_norm(a - b)


def test_kappa_is_the_norm_of_the_whole_product():
    W_Q, W_K = weights(0, 6, 2, 9, 4)
    found = score_norm(W_Q, W_K)
    for head in range(6):
        product = W_Q[head] @ W_K[head // 3].T
        assert float(found[head]) == pytest.approx(float(torch.linalg.svdvals(product)[0]), rel=1e-12)
    scaled = torch.eye(5, dtype=torch.float64)[None, :, :3]
    assert float(score_norm(2 * scaled, 3 * scaled)) == pytest.approx(6)
    with pytest.raises(InputError, match="6 query heads can't share 4 key heads"):
        score_norm(W_Q, draw(1, 4, 9, 4))


def test_the_plain_pattern_by_hand():
    W_Q, W_K = weights(2, 4, 2, 5, 2)
    x = draw(4, 3, 5)
    found = plain_pattern(x, W_Q, W_K)
    for head in range(4):
        for i in range(3):
            scores = [float((x[i] @ W_Q[head]) @ (x[j] @ W_K[head // 2])) / math.sqrt(2) for j in range(i + 1)]
            total = sum(map(math.exp, scores))
            expected = [math.exp(score) / total for score in scores] + [0.0] * (2 - i)
            assert found[head, i].tolist() == pytest.approx(expected, abs=1e-12)


@settings(max_examples=150)
@given(
    seed=st.integers(0, 2**31),
    pos=st.integers(1, 7),
    d_model=st.integers(1, 6),
    d_head=st.integers(1, 6),
    size=st.floats(1e-3, 30),
    step=st.floats(1e-6, 30),
    shared=st.booleans(),
    masked=st.sampled_from(["causal", "full", "random"]),
)
def test_the_inequality_is_never_violated(
    seed: int, pos: int, d_model: int, d_head: int, size: float, step: float, shared: bool, masked: str
):
    W_Q, W_K = weights(seed, 2, 1 if shared else 2, d_model, d_head)
    x = size * draw(seed + 2, pos, d_model)
    other = x + step * draw(seed + 3, pos, d_model)
    visible = {
        "causal": None,
        "full": torch.ones(pos, pos, dtype=torch.bool),
        "random": (draw(seed + 4, pos, pos) > 0) | torch.eye(pos, dtype=torch.bool),
    }[masked]
    moved = change(plain_pattern(x, W_Q, W_K, visible), plain_pattern(other, W_Q, W_K, visible))
    bound = pattern_bound(x, other, score_norm(W_Q, W_K), d_head)
    assert bool((moved <= bound * SLACK + 1e-12).all())


@settings(max_examples=80)
@given(
    seed=st.integers(0, 2**31),
    pos=st.integers(1, 6),
    half=st.integers(1, 3),
    size=st.floats(1e-2, 10),
    step=st.floats(1e-6, 10),
    adjacent=st.booleans(),
)
def test_the_bound_for_rotary_attention_is_never_violated(
    seed: int, pos: int, half: int, size: float, step: float, adjacent: bool
):
    d_head, style = 2 * half, "adjacent" if adjacent else "halves"
    W_Q, W_K = weights(seed, 2, 1, 5, d_head)
    frequencies = component_frequencies(Rotary(style=style), d_head)
    angles = rotary_angles(Rotary(style=style), frequencies, torch.arange(pos)[None], torch.float64)

    def pattern(x: Tensor) -> Tensor:
        q, k = (rotate((x @ w).movedim(0, 1)[None], angles, style)[0].movedim(1, 0) for w in (W_Q, W_K))
        scores = (q @ k.mT / math.sqrt(d_head)).masked_fill(torch.ones(pos, pos).triu(1).bool(), -math.inf)
        return scores.softmax(-1)

    x = size * draw(seed + 2, pos, 5)
    other = x + step * draw(seed + 3, pos, 5)
    assert bool((change(pattern(x), pattern(other)) <= _rotary_bound(x, other, W_Q, W_K) * SLACK + 1e-12).all())


def test_the_largest_token_norm_is_no_bound_on_x():
    """Queries of size 1 read one coordinate, keys the other; all queries look at keys 0 and 1, which move apart."""
    pos, kappa, gap, moved = 40, 200.0, 0.1, 1e-5
    W_Q = torch.tensor([[[kappa], [0.0]]], dtype=torch.float64)
    W_K = torch.tensor([[[0.0], [1.0]]], dtype=torch.float64)
    x = torch.tensor([[1.0, -gap]], dtype=torch.float64).repeat(pos, 1)
    x[:2, 1] = gap
    other = x.clone()
    other[0, 1], other[1, 1] = gap + moved, gap - moved
    full = torch.ones(pos, pos, dtype=torch.bool)
    seen = float(change(plain_pattern(x, W_Q, W_K, full), plain_pattern(other, W_Q, W_K, full)))
    bound = float(pattern_bound(x, other, score_norm(W_Q, W_K), 1))
    spectral = float(torch.linalg.matrix_norm(other, ord=2))
    with_token_norm = bound * float(other.norm(dim=1).max()) / spectral
    assert with_token_norm < seen <= bound


def test_spectral_norms_of_the_differences_are_not_enough():
    """Softmax of each row moves a matrix of spectral norm δ by more than δ / 2: the rows add up in one column."""
    size, delta = 40, 1e-4
    logits = torch.full((size, size), -60.0, dtype=torch.float64)
    logits[:, 0] = 0
    logits[torch.arange(1, size), torch.arange(1, size)] = 0  # row i looks at keys 0 and i alike
    moved = torch.diag(torch.full((size,), delta, dtype=torch.float64))
    moved[0, 0] = 0
    difference = (logits + moved).softmax(-1) - logits.softmax(-1)
    assert float(torch.linalg.matrix_norm(moved, ord=2)) == pytest.approx(delta)
    assert float(torch.linalg.matrix_norm(difference, ord=2)) > delta / 2
    assert float(torch.linalg.matrix_norm(difference)) <= float(torch.linalg.matrix_norm(moved)) / 2


def reading(model: LoopedModel, cache: Any, layer: int, loop: int) -> Tensor:
    """What W_Q reads, taken from the equations: the residual stream through the norm, or as it is."""
    x = cache["resid_pre", layer, loop][0].double()
    if model.cfg.norm_placement == "output":
        return x
    scale = (x.square().mean(-1, keepdim=True) + model.cfg.eps).sqrt()
    return x / scale * model.transformer.blocks[layer].ln1.weight.double()


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_every_number_against_a_full_cache(family: str):
    model = parity(family, torch.float64)
    prompt = tokens_for(model, 1, 6)
    result = attention_bound(model, prompt, 3)
    _, cache = model.run_with_cache(prompt, 3)
    cfg = model.cfg
    assert bool(result.bound[0].isnan().all()) and not bool(result.bound[1:].isnan().any())
    for layer in range(cfg.n_core):
        attention = model.transformer.blocks[layer].attn
        for t in (1, 2):
            x, before = (reading(model, cache, layer, loop) for loop in (t, t - 1))
            step = float(torch.linalg.norm(x - before))
            larger = max(float(torch.linalg.svdvals(one)[0]) for one in (x, before))
            assert float(result.step[t, layer]) == pytest.approx(step, rel=1e-9)
            assert float(result.norm[t, layer]) == pytest.approx(larger, rel=1e-9)
            for head in range(cfg.n_heads):
                kv = head * cfg.kv_heads // cfg.n_heads
                product = attention.W_Q[head].double() @ attention.W_K[kv].double().T
                kappa = float(torch.linalg.svdvals(product)[0])
                assert float(result.kappa[layer, head]) == pytest.approx(kappa, rel=1e-9)
                bound = 0.5 * 2 * larger * kappa / math.sqrt(cfg.d_head) * step
                assert float(result.bound[t, layer, head]) == pytest.approx(bound, rel=1e-9)
                a, b = (cache["pattern", layer, loop][0, head] for loop in (t, t - 1))
                assert float(result.observed[t, layer, head]) == pytest.approx(float(change(a, b)), abs=1e-9)
                w = attention.W_Q[head : head + 1].double(), attention.W_K[kv : kv + 1].double()
                plain = float(change(plain_pattern(x, *w), plain_pattern(before, *w)))
                assert float(result.plain[t, layer, head]) == pytest.approx(plain, abs=1e-9)


@pytest.mark.parametrize("family", [*TINY, *FAMILIES])
def test_the_inequality_holds_on_models_without_what_it_ignores(family: str):
    model = tiny(family) if family in TINY else parity(family)
    options = {} if family in TINY else {k: v[:1, :6] for k, v in run_options(family, model).items()}
    result = attention_bound(model, tokens_for(model, 1, 6), 5, **options)
    assert bool((result.plain[1:] <= result.bound[1:] * SLACK).all())
    covered = not (model.cfg.qk_bias or model.cfg.qk_norm)
    assert bool(result.rotary_bound[1:].isnan().any()) != covered
    if covered:
        assert bool((result.observed[1:] <= result.rotary_bound[1:] + 1e-6).all())
    assert "rotary position embedding" in result.breaks
    assert ("biases on queries and keys" in result.breaks) == model.cfg.qk_bias
    assert ("norms on queries and keys" in result.breaks) == (model.cfg.qk_norm is not None)


def test_half_precision_weights():
    model, wide = tiny("llama", torch.bfloat16), tiny("llama", torch.float32)
    result, expected = (attention_bound(one, tokens_for(one, 1, 12), 3) for one in (model, wide))
    assert bool((result.plain[1:] <= result.bound[1:] * SLACK).all())
    torch.testing.assert_close(result.kappa, expected.kappa, rtol=0.03, atol=0)
    torch.testing.assert_close(result.bound[1], expected.bound[1], rtol=0.2, atol=0)
    stable = attention_stability(model, tokens_for(model, 1, 12), 3)
    torch.testing.assert_close(result.observed[1:].float(), stable.frobenius_to_previous[1:])


def test_a_change_above_the_bound_is_reported():
    """Norms on queries and keys undo the smallness of their weights, which the proposition trusts."""
    model = make(**TINY["olmo2"])
    with torch.no_grad():
        for block in model.transformer.blocks:
            block.attn.q.weight.mul_(1e-3)
            block.attn.k.weight.mul_(1e-3)
            block.attn.q_norm.eps = block.attn.k_norm.eps = 1e-30
    result = attention_bound(model, tokens_for(model, 1, 6), 4)
    assert bool(result.exceeded().any()) and bool((result.plain[1:] <= result.bound[1:] * SLACK).all())
    assert float(result.looseness()[result.exceeded()].max()) < 1


def test_tables_figures_and_files(tmp_path: Path):
    model = tiny("llama")
    result = attention_bound(model, tokens_for(model, 1), 4)
    table = result.to_dataframe()
    assert len(table) == 3 * 2 * 4 and not table.isna().any().any()
    row = table.query("loop == 2 and layer == 1 and head == 3").iloc[0]
    assert row["looseness"] == pytest.approx(row["bound"] / row["observed"])
    assert row["step"] == float(result.step[2, 1]) and row["kappa"] == float(result.kappa[1, 3])
    assert result.n_tokens == 5 and not bool(result.vacuous()[0].any())
    assert torch.equal(result.vacuous()[1:], result.bound[1:] >= math.sqrt(10))
    plain, observed, diagonal = result.plot().data
    assert len(plain.x) == len(observed.x) == 24 and list(diagonal.x) == list(diagonal.y)
    place = list(observed.customdata).index("loop 2, layer 1, head 3")
    assert observed.x[place] == pytest.approx(row["observed"], rel=1e-4)
    assert observed.y[place] == pytest.approx(row["bound"], rel=1e-4)
    loaded = AttentionBound.load(result.save(tmp_path / "bound"))
    assert torch.equal(loaded.bound[1:], result.bound[1:]) and loaded.breaks == result.breaks


def test_a_model_at_rest_has_no_looseness_and_no_figure():
    model = make()  # no injection: layers that add nothing leave the state as it is
    with torch.no_grad():
        for block in model.transformer.blocks:
            block.attn.o.weight.zero_()
            block.mlp.down.weight.zero_()
    result = attention_bound(model, tokens_for(model, 1), 2)
    assert bool((result.step[1] == 0).all()) and bool((result.observed[1] == 0).all())
    assert bool(result.looseness().isnan().all()) and not bool(result.exceeded().any())
    with pytest.raises(InputError, match="no pattern changed, so there is nothing to draw"):
        result.plot()


def run(**options: Any) -> AttentionBound:
    model = tiny("llama")
    options = {"prompts": tokens_for(model, batch=1), "n_loops": 3, **options}
    return attention_bound(model, **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n_loops": 1}, "this compares loops, and the run has 1"),
        ({"prompts": torch.zeros(3, 5, dtype=torch.int64)}, "one prompt, got 3"),
        ({"prompts": torch.zeros(1, 1, dtype=torch.int64)}, "single token"),
    ],
)
def test_what_the_bound_refuses(options: dict[str, Any], message: str):
    with pytest.raises(InputError, match=message):
        run(**options)


def test_a_state_that_is_not_finite_is_named_and_no_hook_is_left():
    model = make(**TINY["llama"])
    with torch.no_grad():
        model.transformer.injection.weight.fill_(1e38)
    with pytest.raises(InputError, match="not finite, from 'loop.0.hook_injection' .* on"):
        attention_bound(model, tokens_for(model, 1), 3)
    assert not any(point.handles() for point in model.hook_dict.points())
