"""Stages of inference: each measure against a closed form, against loops over single numbers, and on models."""

import itertools
import math
from typing import Any

import pytest
import torch
from helpers import TINY, tiny, tokens_for
from test_unrolled import bridge, looped
from torch import Tensor

from tl_looped.engine.errors import InputError
from tl_looped.observe import observe
from tl_looped.stages import STAGE_MEASURES
from tl_looped.stages.measures import (
    colsum_concentration,
    matrix_entropy,
    mixing_score,
    residual_magnitude,
    sink_rate,
    sink_score,
)

PATTERN_FUNCTIONS = (colsum_concentration, sink_score, mixing_score)


def uniform(size: int) -> Tensor:
    return torch.full((size, size), 1 / size, dtype=torch.float64)


def one_hot(size: int, key: int) -> Tensor:
    pattern = torch.zeros(size, size, dtype=torch.float64)
    pattern[:, key] = 1
    return pattern


def causal(*shape: int) -> Tensor:
    scores = 3 * torch.randn(*shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return scores.masked_fill(torch.ones(shape[-2:]).triu(1).bool(), -math.inf).softmax(-1)


def slow(pattern: Tensor, key: int) -> tuple[float, float, float]:
    """(ColSum concentration, sink score, mixing score) of one pattern."""
    rows, keys = pattern.shape
    columns = [sum(float(pattern[i, j]) for i in range(rows)) / rows for j in range(keys)]
    concentration = 1 + sum(c * math.log(c) for c in columns if c > 0) / math.log(keys)
    entropies = [-sum(float(p) * math.log(float(p)) for p in row if p > 0) for row in pattern]
    return concentration, columns[key], sum(entropies) / rows


def test_uniform_one_hot_and_identity_patterns():
    size = 6
    assert float(colsum_concentration(uniform(size))) == pytest.approx(0, abs=1e-12)
    assert float(mixing_score(uniform(size))) == pytest.approx(math.log(size))
    assert float(sink_score(uniform(size))) == pytest.approx(1 / size)
    for key in (0, 3):
        assert float(colsum_concentration(one_hot(size, key))) == 1
        assert float(mixing_score(one_hot(size, key))) == 0
        assert float(sink_score(one_hot(size, key), key)) == 1
    assert float(sink_score(one_hot(size, 3))) == 0 and float(sink_score(one_hot(size, 5), -1)) == 1
    itself = torch.eye(size, dtype=torch.float64)  # every query at another key: certain, but spread over columns
    assert float(mixing_score(itself)) == 0 and float(colsum_concentration(itself)) == pytest.approx(0, abs=1e-12)


def test_against_loops_over_single_numbers():
    patterns = causal(2, 3, 7, 7)
    found = colsum_concentration(patterns), sink_score(patterns, 2), mixing_score(patterns)
    for i in range(2):
        for head in range(3):
            for ours, theirs in zip(found, slow(patterns[i, head], 2), strict=True):
                assert ours.shape == (2, 3)
                assert float(ours[i, head]) == pytest.approx(theirs, abs=1e-12)


@pytest.mark.parametrize("function", PATTERN_FUNCTIONS)
@pytest.mark.parametrize("batch", [(2,), (2, 3), (2, 3, 4)])
def test_axes_in_front_are_patterns_of_their_own(function: Any, batch: tuple[int, ...]):
    pattern = torch.rand(*batch, 5, 6, dtype=torch.float64)
    pattern /= pattern.sum(-1, keepdim=True)
    found = function(pattern)
    assert found.shape == batch
    for place in itertools.product(*map(range, batch)):
        assert found[place].item() == pytest.approx(function(pattern[place]).item())


def test_some_queries_of_a_pattern():
    rows = causal(9, 9)[5:]
    for ours, theirs in zip((f(rows) for f in PATTERN_FUNCTIONS), slow(rows, 0), strict=True):
        assert float(ours) == pytest.approx(theirs, abs=1e-12)


def test_sink_rate_counts_heads_at_the_threshold():
    scores = torch.tensor([0.1, 0.3, 0.29999, 0.9], dtype=torch.float64)
    pattern = torch.stack([torch.stack([torch.tensor([s, 1 - s])] * 2) for s in scores.tolist()])
    assert float(sink_rate(pattern)) == 0.5
    assert float(sink_rate(pattern, threshold=0.05)) == 1 and float(sink_rate(pattern, key=1)) == 0.75
    assert float(sink_rate(pattern.float())) == 0.5
    assert sink_rate(causal(3, 2, 4, 5, 5)).shape == (3, 2)


@pytest.mark.parametrize("function", [*PATTERN_FUNCTIONS, sink_rate])
def test_a_single_key_is_no_number(function: Any):
    assert bool(function(torch.ones(2, 3, 1, 1)).isnan().all())


@pytest.mark.parametrize("function", [*PATTERN_FUNCTIONS, sink_rate])
def test_what_does_not_sum_to_one_is_refused(function: Any):
    with pytest.raises(InputError, match="away from one"):
        function(torch.rand(2, 4, 4) + 0.5)
    with pytest.raises(InputError, match="NaN or infinity"):
        function(torch.full((2, 4, 4), float("nan")))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_measured_in_float32(dtype: torch.dtype):
    pattern = causal(2, 8, 8).to(dtype)
    for function in PATTERN_FUNCTIONS:
        found = function(pattern)
        assert found.dtype == torch.float32
        torch.testing.assert_close(found, function(causal(2, 8, 8)).float(), atol=2e-2, rtol=2e-2)


def test_matrix_entropy_of_known_gram_matrices():
    identity = torch.eye(5, 8, dtype=torch.float64)
    assert float(matrix_entropy(identity)) == pytest.approx(math.log(5))
    rank_one = torch.outer(torch.arange(1.0, 6), torch.arange(1.0, 9))
    assert float(matrix_entropy(rank_one)) == pytest.approx(0, abs=1e-10)
    two = torch.zeros(4, 8)
    two[0, 0], two[1, 1] = 3.0, 4.0  # eigenvalues 9 and 16 of 25
    expected = -(9 / 25) * math.log(9 / 25) - (16 / 25) * math.log(16 / 25)
    assert float(matrix_entropy(two)) == pytest.approx(expected)
    tall = torch.eye(8, 5, dtype=torch.float64)  # more tokens than dimensions
    assert float(matrix_entropy(tall)) == pytest.approx(math.log(5))


def test_one_massive_activation_compresses():
    x = torch.randn(6, 16)
    x[0, 3] = 1e4
    assert float(matrix_entropy(x)) < 1e-3 < float(matrix_entropy(torch.randn(6, 16)))


@pytest.mark.parametrize(("pos", "d_model"), [(4, 9), (9, 4)])
def test_matrix_entropy_from_singular_values(pos: int, d_model: int):
    x = torch.randn(2, 3, pos, d_model)
    found = matrix_entropy(x)
    assert found.shape == (2, 3) and found.dtype == torch.float64
    for i in range(2):
        for j in range(3):
            squares = [float(s) ** 2 for s in torch.linalg.svdvals(x[i, j].double())]
            shares = [square / sum(squares) for square in squares]
            expected = -sum(share * math.log(share) for share in shares)
            assert float(found[i, j]) == pytest.approx(expected, abs=1e-9)
    torch.testing.assert_close(matrix_entropy(1e25 * x), found)  # its squares are no float32
    assert float(matrix_entropy(x.bfloat16())[0, 0]) == pytest.approx(float(found[0, 0]), rel=0.05)


def test_matrix_entropy_where_there_is_none():
    assert bool(matrix_entropy(torch.randn(3, 1, 8)).isnan().all())
    assert bool(matrix_entropy(torch.zeros(4, 8)).isnan())
    some = matrix_entropy(torch.stack([torch.zeros(4, 8), torch.eye(4, 8)]))
    assert bool(some[0].isnan()) and float(some[1]) == pytest.approx(math.log(4))


def test_residual_magnitude():
    x = torch.tensor([[3.0, 4.0], [0.0, 0.0], [-1.0, 0.0]])
    assert residual_magnitude(x).tolist() == [5, 0, 1]
    assert residual_magnitude(x.half()).dtype == torch.float32
    assert float(residual_magnitude(torch.full((1, 1024), 300.0).half())) == pytest.approx(9600)
    assert residual_magnitude(1e25 * x).tolist() == pytest.approx([5e25, 0, 1e25])  # squares overflow in float32


@pytest.mark.parametrize("function", [matrix_entropy, residual_magnitude])
@pytest.mark.usefixtures("as_a_user")
def test_what_is_no_residual_stream(function: Any):
    for wrong in (float("nan"), float("inf")):
        x = torch.ones(2, 3, 4)
        x[1, 2, 0] = wrong
        with pytest.raises(InputError, match="states are not finite from axis 0 1, axis 1 2 on"):
            function(x)
    for x in (torch.ones(4), torch.ones(2, 4, dtype=torch.int64), torch.ones(2, 0, 4)):
        with pytest.raises(InputError, match=r"must be floats \[..., pos, d_model\]"):
            function(x)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: sink_score(uniform(3), 3), "key 3 is out of range"),
        (
            lambda: sink_rate(uniform(3)[None], threshold=1.5),
            "number of at least 0 and at most 1, got 1.5",
        ),
        (lambda: sink_rate(uniform(3)), r"must be floats \[..., head, query, key\], not empty, got .* \(3, 3\)"),
    ],
)
@pytest.mark.usefixtures("as_a_user")
def test_options_that_are_refused(call: Any, message: str):
    with pytest.raises(InputError, match=message):
        call()


@pytest.mark.parametrize("family", TINY)
def test_the_measures_on_a_model_are_those_of_its_cache(family: str):
    model = tiny(family, torch.float64)
    tokens = tokens_for(model)
    observed = observe(model, tokens, 3, measures=STAGE_MEASURES, progress=False)
    _, cache = model.run_with_cache(tokens, 3)
    for depth, (stack, layer, loop) in enumerate(observed.schedule.layer_calls()):
        at = f"{stack}.{layer}." + ("" if loop is None else f"loop.{loop}.")
        for row in range(2):
            pattern, resid = cache[at + "attn.hook_pattern"][row], cache[at + "hook_resid_post"][row]
            by_hand = [slow(pattern[head], 0) for head in range(4)]
            for index, name in enumerate(("colsum", "sink", "mixing")):
                expected = [numbers[index] for numbers in by_hand]
                assert observed[name][row, depth].tolist() == pytest.approx(expected, abs=1e-9)
            sinks = sum(numbers[1] >= 0.3 for numbers in by_hand) / 4
            assert float(observed["sink_rate"][row, depth]) == sinks
            norms = [math.sqrt(sum(float(value) ** 2 for value in token)) for token in resid]
            assert float(observed["magnitude"][row, depth]) == pytest.approx(sum(norms) / len(norms))
            expected = float(matrix_entropy(resid))
            assert float(observed["residual_entropy"][row, depth]) == pytest.approx(expected)


def test_the_same_functions_on_a_feedforward_model():
    control = bridge()  # transformers' Llama, six layers
    tokens = tokens_for(looped()).clamp(
        min=2
    )  # ids 0 and 1 are padding and <bos>: observe leaves padding at an edge out
    _, cache = control.run_with_cache(tokens)
    observed = observe(control, tokens, measures=STAGE_MEASURES, progress=False)
    for layer in range(6):
        pattern = cache["pattern", layer]
        torch.testing.assert_close(observed["mixing"][:, layer], mixing_score(pattern))
        torch.testing.assert_close(observed["sink_rate"][:, layer], sink_rate(pattern))
        entropy = matrix_entropy(cache["resid_post", layer])
        torch.testing.assert_close(observed["residual_entropy"][:, layer], entropy, check_dtype=False)


def test_every_stage_measure_draws_itself():
    model = tiny("llama")
    observed = observe(model, tokens_for(model, 3), 3, measures=STAGE_MEASURES, progress=False)
    for measure in STAGE_MEASURES:
        for group in ("depth", "loop", "layer"):
            fig = observed.plot(measure.name, group)
            assert fig.layout.yaxis.title.text.startswith(measure.label)
            assert any(y is not None for trace in fig.data for y in trace.y)
