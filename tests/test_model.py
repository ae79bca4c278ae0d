"""Running a model: parts of a run, seeds, masks, return types, number formats, and what patching relies on."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import FAMILIES, TINY, expected, hook_count, make, noise_like, parity, run_options, tiny, tokens_for

from tl_looped import DEFAULT_SEED, LoopedModel

DRAWN = ["huginn", "llama", "olmo2"]  # their first state is random
CLOSE = {"rtol": 1e-4, "atol": 1e-4}  # float32, over sums of other lengths


@pytest.fixture(params=TINY)
def model(request: pytest.FixtureRequest) -> LoopedModel:
    return tiny(request.param)


@pytest.fixture
def tokens(model: LoopedModel) -> torch.Tensor:
    return tokens_for(model)


# Parts of a run.


@pytest.mark.parametrize("family", FAMILIES)
def test_stopping_and_starting_again_is_the_whole_run(family: str):
    model, tokens, options = parity(family), expected(family)["input_ids"], run_options(family, parity(family))
    with torch.no_grad():
        whole = model(tokens, **options)
        for t in range(model.cfg.n_loops):
            state = model(tokens, stop_at_loop=t, **options)
            assert torch.equal(model(tokens, initial_state=state, start_at_loop=t), whole)
        state = model(tokens, stop_at_loop=model.cfg.n_loops, **options)
        assert torch.equal(model.readout(state, tokens), whole)


@pytest.mark.parametrize("family", FAMILIES)
def test_fewer_loops_are_the_readout_of_an_earlier_state(family: str):
    model, tokens, options = parity(family), expected(family)["input_ids"], run_options(family, parity(family))
    with torch.no_grad():
        _, cache = model.run_with_cache(tokens, n_loops=6, names_filter="hook_state_post", **options)
        for t in range(6):
            assert torch.equal(model(tokens, n_loops=t + 1, **options), model.readout(cache["state_post", t], tokens))


def test_where_a_part_stops(model, tokens):
    """stop_at_loop=t gives what enters loop t, before injection; negative numbers count from the end."""
    _, cache = model.run_with_cache(tokens, n_loops=4)
    for t in range(4):
        state = model(tokens, n_loops=4, stop_at_loop=t)
        assert torch.equal(state, cache["state_pre", t])
        assert torch.equal(state, model(tokens, n_loops=4, stop_at_loop=t - 4))
    assert torch.equal(model(tokens, n_loops=4, stop_at_loop=4), cache["state_post", 3])
    assert torch.equal(model(tokens, stop_at_loop=0), cache["state_init"])


def test_a_part_of_a_part(model, tokens):
    early = model(tokens, n_loops=5, stop_at_loop=1)
    late = model(tokens, n_loops=5, initial_state=early, start_at_loop=1, stop_at_loop=-1)
    assert torch.equal(late, model(tokens, n_loops=5, stop_at_loop=4))
    assert torch.equal(model(tokens, n_loops=5, initial_state=early, start_at_loop=-4, stop_at_loop=1), early)


def test_only_the_remaining_loops_run(model, tokens):
    names = []
    state = model(tokens, n_loops=4, stop_at_loop=2)
    hooks = [(lambda name: name.endswith("hook_state_pre"), lambda x, hook: names.append(hook.loop))]
    model.run_with_hooks(tokens, n_loops=4, initial_state=state, start_at_loop=2, fwd_hooks=hooks)
    assert names == [2, 3]


# Seeds and states.


@pytest.mark.parametrize("family", DRAWN)
def test_a_drawn_state_repeats(family: str):
    model = tiny(family)
    tokens = tokens_for(model)
    default = model(tokens)
    torch.manual_seed(123)
    assert torch.equal(model(tokens), default)
    assert torch.equal(model(tokens, seed=DEFAULT_SEED), default)
    assert torch.equal(model(tokens, seed=5), model(tokens, seed=5))
    assert not torch.allclose(model(tokens, seed=5), default, atol=1e-3)
    assert torch.equal(model(tokens, initial_state=model(tokens, stop_at_loop=0, seed=5)), model(tokens, seed=5))


@pytest.mark.parametrize("family", DRAWN)
def test_training_draws_afresh(family: str):
    model = make(**TINY[family]).train()
    tokens = tokens_for(model)
    assert not torch.equal(model(tokens), model(tokens))
    assert torch.equal(model(tokens, seed=3), model(tokens, seed=3))
    torch.manual_seed(7)
    first = model(tokens)
    torch.manual_seed(7)
    assert torch.equal(model(tokens), first)


def test_a_run_says_what_made_it(model, tokens):
    for options, wanted in [({"seed": 3}, "seed 3"), ({}, "seed 0")]:
        drawn = model.cfg.draws_state
        assert model.batch(tokens, **options).describe()["initial_state"] == (wanted if drawn else "model")
    state = model(tokens, stop_at_loop=1)
    run = model.batch(tokens, n_loops=4, initial_state=state, start_at_loop=1, stop_at_loop=-1)
    assert run.describe() == {"n_loops": 4, "start_at_loop": 1, "stop_at_loop": 3, "initial_state": "given"}


@pytest.mark.parametrize("kind", ["normal", "truncated_normal"])
@pytest.mark.parametrize("d_model", [16, 20])
def test_the_distribution_of_a_drawn_state(kind: str, d_model: int):
    """Standard deviation and cut as configured, one draw a position; a longer prompt begins with the shorter one."""
    options: dict[str, Any] = {"state_init": kind, "state_init_std": 0.5, "state_init_scale": 3.0}
    model = make(**options, injection="add", d_model=d_model, n_ctx=1000)
    state = model(torch.zeros(2, 1000, dtype=torch.long), stop_at_loop=0, seed=1)
    assert torch.equal(state[0], state[1])
    assert float(state.mean()) == pytest.approx(0, abs=0.05)
    truncated = kind == "truncated_normal"
    std = 0.5 * 3 * (0.98658 if truncated else 1)  # a normal cut at three has a standard deviation of 0.98658
    assert float(state.std()) == pytest.approx(std, rel=0.02)
    assert (float(state.abs().max()) <= 4.5) == truncated
    for length in (1, 2, 15, 16, 17, 33, 100, 500):
        assert torch.equal(
            model(torch.zeros(1, length, dtype=torch.long), stop_at_loop=0, seed=1)[0], state[0, :length]
        )


def test_rows_of_a_batch_do_not_see_each_other(model):
    tokens = tokens_for(model, batch=3)
    alone = torch.cat([model(row[None]) for row in tokens])
    torch.testing.assert_close(model(tokens), alone, **CLOSE)


def test_a_prefix_does_not_see_what_follows(model):
    tokens = tokens_for(model, pos=9)
    torch.testing.assert_close(model(tokens)[:, :5], model(tokens[:, :5]), **CLOSE)


# Masks and positions.


def test_padded_tokens_are_not_seen(model):
    tokens = tokens_for(model, batch=1, pos=4)
    other = tokens_for(model, batch=1, pos=3, seed=9)
    wanted = model(tokens)
    left, right = torch.cat((other, tokens), dim=1), torch.cat((tokens, other), dim=1)
    for row, mask, real in (
        (left, [0, 0, 0, 1, 1, 1, 1], slice(3, 7)),
        (right, [1, 1, 1, 1, 0, 0, 0], slice(0, 4)),
    ):
        for form in (torch.tensor([mask]), torch.tensor([mask]).bool(), torch.tensor([mask]).float()):
            logits = model(row, attention_mask=form)
            torch.testing.assert_close(logits[:, real], wanted, **CLOSE)
            assert bool(logits.isfinite().all())


def test_patterns_of_padded_runs_stay_whole(model):
    tokens = tokens_for(model, batch=2, pos=5)
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 0]])
    _, cache = model.run_with_cache(tokens, attention_mask=mask, names_filter="blocks.0.attn.hook_pattern")
    pattern = cache["pattern", 0, 1]
    torch.testing.assert_close(pattern.sum(-1), torch.ones_like(pattern.sum(-1)))
    assert float(pattern[0, :, 2:, :2].abs().max()) == 0
    assert float(pattern[1, :, :4, 4].abs().max()) == 0


def test_a_mask_of_ones_is_no_mask(model, tokens):
    assert torch.equal(model(tokens, attention_mask=torch.ones_like(tokens)), model(tokens))


def test_a_full_mask_says_who_sees_whom(model, tokens):
    batch, pos = tokens.shape
    triangle = torch.ones(batch, pos, pos).tril().bool()
    torch.testing.assert_close(model(tokens, attention_mask=triangle), model(tokens), rtol=1e-5, atol=1e-5)
    both_ways = torch.ones(batch, pos, pos).bool()
    _, cache = model.run_with_cache(tokens, attention_mask=both_ways, names_filter="blocks.0.attn.hook_pattern")
    assert float(cache["pattern", 0, 0].min()) > 0


def test_positions_shift_nothing_but_what_they_number(model, tokens):
    """Rotary sees differences of positions alone, so a shift of all changes nothing once the state is given."""
    positions = torch.arange(tokens.shape[1]).expand_as(tokens)
    assert torch.equal(model(tokens, position_ids=positions), model(tokens))
    state = noise_like(model(tokens, stop_at_loop=0))
    shifted = model(tokens, position_ids=positions + 7, initial_state=state)
    torch.testing.assert_close(shifted, model(tokens, initial_state=state), rtol=1e-4, atol=1e-4)
    spread = model(tokens, position_ids=positions * 2, initial_state=state)
    assert not torch.allclose(spread, model(tokens, initial_state=state), atol=1e-3)


# What a run returns.


def test_return_types(model, tokens):
    logits, loss = model(tokens), model(tokens, return_type="loss")
    both = model(tokens, return_type="both")
    assert torch.equal(both[0], logits)
    assert torch.equal(both[1], loss)
    assert model(tokens, return_type=None) is None
    assert logits.shape == (2, 5, model.cfg.d_vocab)
    wanted = F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
    torch.testing.assert_close(loss, wanted)
    per_token = model(tokens, return_type="loss", loss_per_token=True)
    assert per_token.shape == (2, 4)
    torch.testing.assert_close(per_token.mean(), loss)
    assert torch.equal(model(tokens[0]), model(tokens[:1]))


def test_the_loss_leaves_padding_out(model):
    tokens = tokens_for(model, pos=6)
    mask = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 0]])
    logits, loss = model(tokens, attention_mask=mask, return_type="both")
    rows = [F.cross_entropy(logits[0, 2:5], tokens[0, 3:], reduction="none")]
    rows += [F.cross_entropy(logits[1, :4], tokens[1, 1:5], reduction="none")]
    torch.testing.assert_close(loss, torch.cat(rows).mean())


@pytest.mark.parametrize("kind", [torch.int32, torch.int16, torch.uint8])
def test_kinds_of_token_ids(model, tokens, kind):
    assert torch.equal(model(tokens.to(kind)), model(tokens))


# Number formats, gradients, copies.


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_number_formats(model, tokens, dtype):
    converted = copy.deepcopy(model).to(dtype)
    logits, cache = converted.run_with_cache(tokens)
    assert converted.dtype == logits.dtype == dtype
    wanted = model(tokens)
    error = ((logits - wanted).norm() / wanted.norm()).item()
    assert error < {torch.bfloat16: 0.1, torch.float16: 0.02, torch.float64: 1e-5}[dtype]
    assert cache["resid_post", 0, 0].dtype == cache["pattern", 0, 0].dtype == dtype
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    norm = cache[
        "blocks.0.loop.0.ln2_post.hook_scale" if model.cfg.norm_placement == "output" else ("scale", 0, 0, "ln1")
    ]
    assert norm.dtype == wide  # norms compute in float32 at least
    assert bool(logits.isfinite().all())


def test_gradients_are_the_sum_over_loops(model, tokens):
    """Freed at one loop at a time: the weights' gradient is the sum of what each loop gives."""
    model = copy.deepcopy(model).double()
    weight = model.transformer.blocks[0].mlp.down.weight
    whole = torch.autograd.grad(model(tokens, n_loops=3, return_type="loss"), weight)[0]
    _, cache = model.run_with_cache(
        tokens,
        n_loops=3,
        return_type="loss",
        incl_bwd=True,
        names_filter=lambda name: "mlp" in name or "mlp_out" in name,
    )
    parts = []
    for t in range(3):
        if model.cfg.norm_placement in ("output", "output_sandwich"):
            grad = through_norm(model, cache, t)
        else:
            grad = cache["mlp_out_grad", 0, t]
        parts.append(torch.einsum("bpm,bpd->md", grad, cache["post", 0, t]))
    torch.testing.assert_close(sum(parts), whole, rtol=1e-8, atol=1e-10)
    assert all(float(part.abs().max()) > 1e-8 for part in parts)


def through_norm(model: LoopedModel, cache: Any, t: int) -> torch.Tensor:
    """The gradient of mlp_out taken back through the norm after the MLP."""
    block = model.transformer.blocks[0]
    before = (cache["post", 0, t] @ block.mlp.down.weight.T).detach().requires_grad_()
    after = before / (before.pow(2).mean(-1, keepdim=True) + model.cfg.eps).sqrt() * block.ln2_post.weight.detach()
    return torch.autograd.grad(after, before, cache["mlp_out_grad", 0, t])[0]


def test_every_weight_gets_a_gradient(model, tokens):
    model = copy.deepcopy(model)
    model(tokens, return_type="loss").backward()
    without = [name for name, weight in model.named_parameters() if weight.grad is None or not weight.grad.any()]
    assert without == (["transformer.exit_gate.weight", "transformer.exit_gate.bias"] if model.cfg.exit_gate else [])


def test_a_copy_is_apart(model, tokens):
    wanted = model(tokens)
    other = copy.deepcopy(model)
    assert torch.equal(other(tokens), wanted)
    seen = []
    other.add_hook("blocks.0.loop.1.hook_resid_post", lambda x, hook: seen.append(hook.name))
    third = copy.deepcopy(other)
    model(tokens)
    assert seen == []
    other(tokens)
    assert len(seen) == 1
    assert hook_count(third) == 1
    third.reset_hooks()
    assert (hook_count(third), hook_count(other)) == (0, 1)
    with torch.no_grad():
        third.W_E.mul_(0)
    assert torch.equal(model(tokens), wanted)
    assert not torch.equal(third(tokens), wanted)


def test_what_a_model_says_of_itself(model):
    cfg = model.cfg
    assert model.schedule == cfg.schedule()
    assert model.schedule.n_loops() == cfg.n_loops
    assert (model.device, model.dtype) == (torch.device("cpu"), torch.float32)
    assert (model.W_E.shape, model.W_U.shape) == ((cfg.d_vocab, cfg.d_model), (cfg.d_model, cfg.d_vocab))
    assert torch.equal(model.W_U, model.W_E.T) == cfg.tie_embeddings
    assert not model.training
    with pytest.raises(AttributeError, match="LoopedConfig has no 'n_layers': cfg.n_prelude, cfg.n_core and"):
        _ = cfg.n_layers
    again = LoopedModel.from_config(cfg, seed=11)
    assert all(
        torch.equal(one, two)
        for one, two in zip(again.parameters(), LoopedModel.from_config(cfg, seed=11).parameters(), strict=True)
    )


# What patching relies on.


def patched(model: LoopedModel, tokens: torch.Tensor, cache: Any, names: list[str]) -> torch.Tensor:
    hooks = [(name, lambda x, hook: cache[hook.name]) for name in names]
    return model.run_with_hooks(tokens, n_loops=3, fwd_hooks=hooks)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_patching_clean_into_clean_changes_nothing(model, tokens, mode):
    """To the bit, at every site: also at those that the fused attention and norm do not form."""
    with mode():
        clean, cache = model.run_with_cache(tokens, n_loops=3, names_filter=lambda _: True)
        assert torch.equal(patched(model, tokens, cache, list(cache)), clean)


@pytest.mark.parametrize(
    "site", ["loop.{}.hook_state_pre", "loop.{}.hook_injection", "blocks.1.loop.{}.hook_resid_post"]
)
def test_patching_everything_at_one_site_restores_the_output(model, tokens, site):
    """From the last loop there is no other way around the site than injection, which comes before it."""
    name = site.format(2)
    corrupted = tokens_for(model, seed=8)
    with torch.no_grad():
        clean, cache = model.run_with_cache(tokens, n_loops=3)
        assert not torch.allclose(model(corrupted, n_loops=3), clean, atol=1e-2)
        restored = torch.equal(patched(model, corrupted, cache, [name]), clean)
    assert restored == (model.cfg.injection == "none" or "state_pre" not in site)


@pytest.mark.parametrize("position", [0, 2, 4])
def test_patching_the_one_embedding_that_differs_restores_the_output(model, tokens, position):
    corrupted = tokens.clone()
    corrupted[:, position] = (corrupted[:, position] + 1) % model.cfg.d_vocab
    with torch.no_grad():
        clean, cache = model.run_with_cache(tokens, n_loops=3)

        def patch(x, hook):
            x[:, position] = cache[hook.name][:, position]

        assert not torch.equal(model(corrupted, n_loops=3), clean)
        assert torch.equal(model.run_with_hooks(corrupted, n_loops=3, fwd_hooks=[("hook_embed", patch)]), clean)
        state = model.run_with_hooks(corrupted, n_loops=3, fwd_hooks=[("loop.0.hook_state_pre", patch)])
        assert torch.equal(state, clean) == (model.cfg.injection == "none" and model.cfg.n_prelude == 0)
