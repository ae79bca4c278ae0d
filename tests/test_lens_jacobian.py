"""The Jacobian lens by loop: TransformerLens's numbers, a slow plain computation, closed forms, and what it refuses."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import PARITY, TINY, TWO_STATES, WORDS, hook_count, make, tiny, tokens_for, word_tokenizer
from torch import Tensor
from transformer_lens.tools import analysis
from unrolled_tools import looped, loops

from tl_looped import InputError, LoopedModel
from tl_looped.lens import JacobianLens, fit_tuned_lens, jacobian_lens, logit_lens

TEXTS = ["a b c a b d e", "b c a d", "a", "h g f e d c"]  # of unequal length, and one of which no position counts
CAUSAL = sorted({path.name for path in PARITY.iterdir() if path.is_dir()} - {"albert", "hrm-act", "trm"})
QUICK: dict[str, Any] = {"skip_first": 0, "progress": False}
pytestmark = pytest.mark.filterwarnings("ignore:.*was trained with a prefix")


def carry(model: LoopedModel, prompts: Any, n_loops: Any = 3, **options: Any) -> JacobianLens:
    return jacobian_lens(model, prompts, n_loops, **{**QUICK, **options})


def linear(matrix: Tensor | None = None, n_loops: int = 3) -> LoopedModel:
    """Layers that add nothing; with a matrix, every loop maps the state by it and adds what it makes of the input."""
    mixed = {} if matrix is None else {"injection": "concat_linear"}
    model = make(torch.float64, n_loops=n_loops, d_model=4, n_heads=1, **mixed)
    network: Any = model.transformer
    with torch.no_grad():
        for block in network.blocks:
            block.attn.o.weight.zero_()
            block.mlp.down.weight.zero_()
        if matrix is not None:
            network.injection.weight[:, :4] = matrix
    return model


def by_hand(model: LoopedModel, tokens: Tensor, n_loops: Any, source: str, target: str, skip: int) -> Tensor:
    """The whole Jacobian of one prompt from one hook point to another, then the sum and the mean of its blocks."""
    _, cache = model.run_with_cache(tokens, n_loops)

    def run(x: Tensor) -> Tensor:
        kept: list[Tensor] = []
        hooks = [(source, lambda _, hook: x), (target, lambda y, hook: kept.append(y))]
        model.run_with_hooks(tokens, n_loops, fwd_hooks=hooks)
        return kept[0]

    whole: Any = torch.autograd.functional.jacobian(run, cache[source].detach())
    counted = slice(skip, tokens.shape[1] - 1)
    return whole[0, counted, :, 0, counted].sum(0).mean(1)


# What it is.


@pytest.mark.filterwarnings("ignore:skipping prompt")
@pytest.mark.parametrize("family", CAUSAL)
def test_it_is_transformerlenss_on_the_view(family: str) -> None:
    model, n_loops = looped(family), loops(family)
    theirs = analysis.JacobianLens.fit(
        model.unrolled(n_loops), TEXTS, corpus="words", skip_first_positions=1, show_progress=False
    )
    stack = model.cfg.looping_stack(model.cfg.head_stack)
    ours = carry(model, TEXTS, n_loops, skip_first=1)
    assert (ours.made_by["prompts"], ours.made_by["left_out"], theirs.n_prompts) == (3, 1, 3)
    assert ours.loops == tuple(range(ours.n_loops))
    for i, t in enumerate(ours.loops):
        for j, layer in enumerate(ours.layers):
            depth = model.cfg.schedule(n_loops).realised_depth(stack, layer, t)
            wanted = theirs.jacobians.get(depth, torch.eye(model.cfg.d_model))  # the last layer is not fitted there
            assert float((ours.matrix[i, j] - wanted).norm() / wanted.norm()) < 1e-5


@pytest.mark.parametrize(
    ("settings", "last"),
    [
        (TINY["huginn"], "coda.0.hook_resid_post"),
        (TINY["ouro"], "blocks.1.loop.2.hook_resid_post"),
        ({**TINY["added"], "loop_update": "damped", "loop_step": 0.5}, "coda.0.hook_resid_post"),
    ],
)
def test_it_is_a_slow_computation(settings: dict[str, Any], last: str) -> None:
    model = make(torch.float64, **settings)
    rows = [tokens_for(model, 1, 5), tokens_for(model, 1, 4, seed=5)]
    for site in ("resid_pre", "resid_mid", "resid_post", "state"):
        lens = carry(model, [row[0].tolist() for row in rows], site=site, loops=[1, 0], skip_first=1)  # pyright: ignore[reportArgumentType]
        assert lens.target == last and lens.loops == (1, 0)
        for i, t in enumerate(lens.loops[: 2 if site == "resid_post" else 1]):
            for j, layer in enumerate(lens.layers):
                name = f"loop.{t}.hook_state_post" if site == "state" else f"blocks.{layer}.loop.{t}.hook_{site}"
                wanted = sum(by_hand(model, row, 3, name, last, 1) for row in rows) / 2
                torch.testing.assert_close(lens.matrix[i, j], wanted)


@pytest.mark.parametrize("stack", ["L_blocks", "H_blocks"])
def test_of_two_stacks_it_is_a_slow_computation(stack: str) -> None:
    model = make(torch.float64, **TWO_STATES)
    tokens, last = tokens_for(model, 1), "H_blocks.1.loop.1.hook_resid_post"
    lens = carry(model, tokens, (2, 2), stack=stack, loops=[1])
    for layer in lens.layers:
        name = f"{stack}.{layer}.loop.1.hook_resid_post"
        torch.testing.assert_close(lens.matrix[0, layer], by_hand(model, tokens, (2, 2), name, last, 0))


def test_layers_that_add_nothing_change_nothing() -> None:
    model = linear()
    lens = carry(model, tokens_for(model))
    identity = torch.eye(4, dtype=torch.float64)
    torch.testing.assert_close(lens.matrix, identity.expand(3, 2, 4, 4))
    torch.testing.assert_close(lens.effective_rank(), torch.full((3, 2), 4.0, dtype=torch.float64))
    options: dict[str, Any] = {"site": "resid_post", "positions": None}
    found = logit_lens(model, tokens_for(model), 3, kind="jacobian", translator=lens, **options)
    wanted = logit_lens(model, tokens_for(model), 3, kind="direct", **options)
    torch.testing.assert_close(found.top_probs, wanted.top_probs)
    assert torch.equal(found.target_ranks, wanted.target_ranks)


def test_where_every_loop_is_a_matrix_it_is_their_product() -> None:
    matrix = torch.randn(4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    model = linear(matrix, n_loops=4)
    tokens = tokens_for(model)
    powers = torch.stack([torch.linalg.matrix_power(matrix, 3 - t) for t in range(4)])
    for site in ("resid_pre", "resid_post", "state"):
        lens = carry(model, tokens, 4, site=site)
        torch.testing.assert_close(lens.matrix, powers[:, None].expand_as(lens.matrix))
        torch.testing.assert_close(lens.singular_values()[:, 0], torch.linalg.svdvals(powers))
    between = carry(model, tokens, 4, site="state", to=2)
    assert (between.loops, between.target) == ((0, 1, 2), "loop.2.hook_state_post")
    torch.testing.assert_close(between.matrix[:, 0], powers[1:])
    onward = carry(model, tokens, 4, site="state").matrix[2, 0]
    torch.testing.assert_close(onward @ between.matrix[0, 0], powers[0])


def test_from_loop_to_loop_it_is_a_slow_computation() -> None:
    model = make(torch.float64, **TINY["ouro"])
    tokens = tokens_for(model, 1)
    states = carry(model, tokens, site="state", to=-2)
    wanted = by_hand(model, tokens, 3, "loop.0.hook_state_post", "loop.1.hook_state_post", 0)
    torch.testing.assert_close(states.matrix[0, 0], wanted)
    layers = carry(model, tokens, site="resid_mid", to=(2, 0))
    assert layers.loops == (0, 1)  # in loop 2, layer 1 comes after layer 0
    wanted = by_hand(model, tokens, 3, "blocks.1.loop.0.hook_resid_mid", "blocks.0.loop.2.hook_resid_mid", 0)
    torch.testing.assert_close(layers.matrix[0, 1], wanted)
    own = carry(model, tokens, site="resid_mid", layers=[0], to=(2, 0))
    torch.testing.assert_close(own.matrix[2, 0], torch.eye(16, dtype=torch.float64))


def test_of_directions_alone_it_is_their_products() -> None:
    model = tiny("huginn")
    tokens = tokens_for(model, 3)
    whole, directions = carry(model, tokens), model.W_U[:, [3, 7, 5]].T
    lens = carry(model, tokens, directions=directions)
    torch.testing.assert_close(lens.matrix, directions.detach() @ whole.matrix)
    x = torch.randn(2, 16)
    torch.testing.assert_close(lens.translate(x, 1, 0), whole.translate(x, 1, 0) @ directions.detach().T)
    assert lens.to_dataframe()["unchanged"].between(-1, 1).all()


# How it reads.


@pytest.mark.parametrize("family", ["huginn", "ouro", "parcae"])
def test_it_reads_through_the_last_norm(family: str) -> None:
    model, n_loops = looped(family), loops(family)
    tokens = torch.tensor([[2, 5, 7, 4], [4, 2, 9, 3]])
    lens = carry(model, tokens, n_loops)
    with torch.no_grad():
        logits, cache = model.run_with_cache(tokens, n_loops)
    found = logit_lens(
        model, tokens, n_loops, kind="jacobian", translator=lens, site="resid_post", positions=None, targets=3
    )
    cfg, gain = model.cfg, model.transformer.head_gain
    assert gain is not None
    for t in lens.loops:
        for layer in lens.layers:
            x = cache["resid_post", layer, t].double() @ lens.matrix[t, layer].double().T
            normed = x / (x.pow(2).mean(-1, keepdim=True) + cfg.eps).sqrt()
            normed = normed * gain.double()
            said = (normed @ model.W_U.double()).detach()
            torch.testing.assert_close(
                found.target_probs[t, layer, ..., 0].double(), said.softmax(-1)[..., 3], rtol=1e-4, atol=1e-7
            )
            assert torch.equal(found.rank_trajectory()[t, layer], (said > said[..., 3:4]).sum(-1))
    if not cfg.n_coda:  # then the last core layer is what the norm reads, and nothing changes it
        torch.testing.assert_close(found.kl_to_final[-1, -1], torch.zeros(2, 4), rtol=0, atol=1e-9)
        assert torch.equal(found.top_ids[-1, -1, ..., 0], logits.argmax(-1))


def test_states_that_come_after_the_last_norm_are_left_out_or_refused() -> None:
    model = tiny("ouro")
    lens = carry(model, tokens_for(model), site="state")
    assert lens.loops == (0, 1)
    with pytest.raises(
        InputError, match=r"the translator has the loops \[0, 1\], not \[2\]: read those alone, with loops="
    ):
        logit_lens(model, tokens_for(model), 3, kind="jacobian", translator=lens)
    logit_lens(model, tokens_for(model), 3, kind="jacobian", translator=lens, loops=[0, 1])
    second = carry(model, tokens_for(model), site="state", loops=[1])  # and none of the loop before
    found = logit_lens(model, tokens_for(model), 3, kind="jacobian", translator=second, loops=[1])
    assert bool(found.kl_to_previous.isnan().all()) and bool(found.kl_to_final.isfinite().all())
    message = r"'state' in loops \[2\] comes after 'blocks.1.loop.2.hook_resid_post', which it is to be carried to"
    with pytest.raises(InputError, match=message):
        carry(model, tokens_for(model), site="state", loops=[1, 2])


# How it is computed.


@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_batches_and_padding_change_nothing(batch_size: int) -> None:
    model = make(torch.float64, word_tokenizer(), **{**TINY["huginn"], "d_vocab": len(WORDS)})
    each = [carry(model, text, skip_first=1).matrix for text in ("a b c a b", "h g f", "d e a b c")]
    together = carry(model, ["a b c a b", "a", "h g f", "d e a b c"], skip_first=1, batch_size=batch_size)
    torch.testing.assert_close(together.matrix, torch.stack(each).mean(0))


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_the_callers_mode_does_not_matter_and_the_model_is_left_alone(mode: Any) -> None:
    model = tiny("llama")
    before = [weight.clone() for weight in model.parameters()]
    wanted = carry(model, tokens_for(model)).matrix
    with mode():
        found = carry(model, tokens_for(model), initial_state=torch.ones(2, 5, 16)).matrix
        assert torch.equal(carry(model, tokens_for(model)).matrix, wanted)
    assert torch.equal(carry(model, tokens_for(model), initial_state=torch.ones(2, 5, 16)).matrix, found)
    assert all(torch.equal(*pair) for pair in zip(before, model.parameters(), strict=True))
    assert all(weight.grad is None and weight.requires_grad for weight in model.parameters())
    assert hook_count(model) == 0 and not wanted.requires_grad


def test_hooks_of_the_caller_act() -> None:
    """A stream that is halved in loop 1 halves what comes from loop 0; one that is replaced lets nothing through."""
    model = linear()
    edits = [(0.5, 0.5), (0.0, 0.0)]
    for factor, wanted in edits:
        hook = ("blocks.0.loop.1.hook_resid_pre", lambda x, hook, factor=factor: x * factor)
        with model.hooks([hook]):
            found = carry(model, tokens_for(model)).matrix
        torch.testing.assert_close(found[0, 0], wanted * torch.eye(4, dtype=torch.float64))
        torch.testing.assert_close(found[1, 0], torch.eye(4, dtype=torch.float64))
    hook = ("blocks.0.loop.1.hook_resid_pre", lambda x, hook: torch.ones_like(x))
    with model.hooks([hook]):
        assert torch.equal(carry(model, tokens_for(model)).matrix[0], torch.zeros(2, 4, 4, dtype=torch.float64))


def test_in_bfloat16_it_is_summed_in_float32() -> None:
    model, exact = tiny("llama", torch.bfloat16), tiny("llama")
    lens, wanted = carry(model, tokens_for(model)), carry(exact, tokens_for(exact))
    assert lens.matrix.dtype == torch.float32
    torch.testing.assert_close(lens.matrix, wanted.matrix, rtol=0.1, atol=0.1)
    found = logit_lens(model, tokens_for(model), 3, kind="jacobian", translator=lens, site="resid_post")
    assert bool(found.kl_to_final.isfinite().all())


# What it shows.


def test_its_numbers_table_figure_and_file(tmp_path: Path) -> None:
    lens = carry(tiny("llama"), tokens_for(tiny("llama")))
    shape = torch.diag(torch.tensor([3.0, 1.0] + [0.0] * 14))
    known = replace(lens, matrix=shape.expand_as(lens.matrix).clone())
    torch.testing.assert_close(known.singular_values()[0, 0, :3], torch.tensor([3.0, 1.0, 0.0]))
    rank = float(torch.tensor([0.75, 0.25]).pow(-torch.tensor([0.75, 0.25])).prod())  # exp(−Σ p log p)
    torch.testing.assert_close(known.effective_rank(), torch.full((3, 2), rank))
    table = known.to_dataframe()
    assert table[["loop", "layer"]].to_numpy().tolist() == [[t, layer] for t in range(3) for layer in range(2)]
    assert table["largest"].tolist() == pytest.approx([3.0] * 6)
    assert table["unchanged"].tolist() == pytest.approx([4 / (10**0.5 * 4)] * 6)
    lines = known.plot().to_dict()["data"]
    assert [line["name"] for line in lines] == ["layer 0", "layer 1"]
    assert lines[1]["y"] == pytest.approx([rank] * 3, rel=1e-4)
    again = JacobianLens.load(lens.save(tmp_path / "lens"))
    assert torch.equal(again.matrix, lens.matrix) and again.directions is None and again.made_by == lens.made_by


# What it refuses.


def reader(**changes: Any) -> LoopedModel:
    return make(tokenizer=word_tokenizer(), **{**TINY["ouro"], "d_vocab": len(WORDS), **changes})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"skip_first": 16}, r"no prompt is longer than skip_first \+ 1 = 17 tokens \(the longest has 4\), so no"),
        ({"skip_first": -1}, "skip_first must be at least 0, got -1"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"loops": [2]}, r"loop 2 is out of range: 2 exist, so it must lie in \[-2, 1\]"),
        ({"layers": [5]}, "layer 5 is out of range: 2 exist"),
        ({"site": "attn_out"}, "site must be one of 'state', 'resid_pre', 'resid_mid', 'resid_post', got 'attn_out'"),
        ({"to": 1}, r"to must be \(loop, layer\) of 'resid_post', got 1"),
        ({"to": (1, 2)}, "the layer of to 2 is out of range: 2 exist"),
        ({"to": (3, 0)}, "the loop of to 3 is out of range: 2 exist"),
        (
            {"to": (0, 0), "layers": [1]},
            r"'resid_post' in loops \[0, 1\] comes after 'blocks.0.loop.0.hook_resid_post'",
        ),
        ({"to": (1, 0), "site": "state"}, r"to must be a loop of 'state', got \(1, 0\)"),
        ({"to": True, "site": "state"}, "the loop of to must be an integer, got True"),
        ({"directions": torch.ones(3, 5)}, r"directions must be \[row, 16\], vectors of the residual .*, got \[3, 5\]"),
        ({"directions": torch.ones(16)}, r"directions must be floats \[row, d_model\], not empty, got .*\(16,\)"),
    ],
)
@pytest.mark.usefixtures("as_a_user")
def test_bad_input_is_refused_before_the_first_run(options: dict[str, Any], message: str) -> None:
    model = reader()
    ran: list[str] = []
    hook = ("hook_embed", lambda x, hook: ran.append(hook.name))
    with model.hooks([hook]), pytest.raises(InputError, match=message):
        carry(model, ["a b c d", "a b"], None, **options)
    assert ran == []


def test_models_that_it_is_not_for() -> None:
    with pytest.raises(InputError, match="jacobian_lens needs a model that reads from left to right"):
        carry(LoopedModel.from_pretrained(PARITY / "trm"), torch.ones(1, 4, dtype=torch.long))
    damped = make(loop_update="damped", loop_step=0.5)
    with pytest.raises(
        InputError, match="reads through one norm, and of custom its head reads the state that the loop"
    ):
        carry(damped, tokens_for(damped))
    assert carry(damped, tokens_for(damped), site="state", to=2).target == "loop.2.hook_state_post"
    prefixed, tokens = make(**TWO_STATES), tokens_for(make(**TWO_STATES))
    with pytest.raises(InputError, match="tokens that see what comes after them have no Jacobian lens"):
        carry(prefixed, tokens, prefix_length=3)
    model = tiny("llama")
    with pytest.raises(InputError, match="or pass an attention_mask= in which none does"):
        carry(model, tokens, attention_mask=torch.ones(2, 5, 5, dtype=torch.long))
    causal = carry(model, tokens, attention_mask=torch.ones(2, 5, 5, dtype=torch.long).tril())
    torch.testing.assert_close(causal.matrix, carry(model, tokens).matrix)


def test_a_lens_of_another_model_loop_count_or_kind() -> None:
    model, texts = reader(), ["a b c d", "a b c e"]
    lens = carry(model, texts)
    options: dict[str, Any] = {"kind": "jacobian", "site": "resid_post"}
    logit_lens(model, texts, 3, translator=lens, **options)
    for other, changes, n_loops, message in [
        (reader(d_mlp=16), {}, 3, r"with other weights than this custom: fit one with jacobian_lens\(model, prompts\)"),
        (model, {}, 4, "fitted on runs of 3 loops, this one has 4: pass n_loops=3, or fit one with jacobian_lens"),
        (model, {"site": "resid_mid"}, 3, "reads 'resid_post', not 'resid_mid': pass site='resid_post'"),
        (model, {"kind": "tuned"}, 3, "translator must be a TunedLens, as fit_tuned_lens gives it, for kind='tuned'"),
    ]:
        with pytest.raises(InputError, match=message):
            logit_lens(other, texts, n_loops, translator=lens, **{**options, **changes})
    for made, message in [
        (carry(model, texts, layers=[0]), r"the translator has the layers \[0\], not \[1\]"),
        (carry(model, texts, to=(2, 1)), "carries states to 'blocks.1.loop.2.hook_resid_post', not to the last norm"),
        (carry(model, texts, directions=torch.eye(16)[:2]), "holds rows of J for some directions alone"),
        (fit_tuned_lens(model, texts, 3, held_out=texts, steps=1, progress=False), "must be a JacobianLens, as jaco"),
    ]:
        with pytest.raises(InputError, match=message):
            logit_lens(model, texts, 3, translator=made, **options)
    with pytest.raises(
        InputError, match="kind='jacobian' needs translator=: fit one with tl_looped.lens.jacobian_lens"
    ):
        logit_lens(model, texts, 3, **options)
