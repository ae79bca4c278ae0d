"""The view of every family: the looped model's numbers at every site, and refusals where a sum does not hold."""

from __future__ import annotations

import copy
from functools import lru_cache
from typing import Any

import pytest
import torch
import transformer_lens.tools.analysis as tools
from families import FOLDERS, load
from helpers import FAMILIES, PARITY, TINY, make, noise_like, parity, tiny, tokens_for
from patching_helpers import CASES, OTHERS, assert_same, case, run_clean, short_prompts
from torch import Tensor
from transformer_lens import patching

from tl_looped import LoopedModel
from tl_looped.engine.errors import InputError
from tl_looped.engine.schedule import DEAD_ENDS
from tl_looped.unrolled import UnrolledModel

STORED = [*FAMILIES, *FOLDERS, "hrm-act", "trm"]  # every folder of tests/parity
pytestmark = pytest.mark.filterwarnings("ignore:.* was trained with a prefix")
MODELS = [*(f"tiny {name}" for name in TINY), *OTHERS, *STORED]


@lru_cache
def named(name: str) -> LoopedModel:
    """A model by its name here."""
    if name in FOLDERS:
        return load(name)
    if name in STORED and name not in FAMILIES:
        return LoopedModel.from_pretrained(PARITY / name)
    return tiny(name.removeprefix("tiny ")) if name.startswith("tiny ") else case(name)


def prompts(model: LoopedModel, batch: int = 2, pos: int = 5) -> Tensor:
    """Random tokens, behind those of a puzzle where the model needs them."""
    tokens = tokens_for(model, batch=batch, pos=pos)
    if model.cfg.puzzles is None:
        return tokens
    return torch.cat([torch.tensor(model.cfg.puzzle_tokens(0)).expand(batch, -1), tokens], dim=1)


@lru_cache
def pair(name: str) -> tuple[LoopedModel, UnrolledModel]:
    """A model and its view, with each head's result."""
    model = named(name)
    unrolled = model.unrolled(2)
    unrolled.set_use_attn_result(True)
    return model, unrolled


# The same numbers at every site.


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_logits_and_every_activation_are_those_of_the_looped_model(name: str) -> None:
    model, unrolled = pair(name)
    tokens = prompts(model)
    ours = run_clean(model, tokens, 2)
    logits, theirs = unrolled.run_with_cache(tokens)
    assert_same("logits", logits, model(tokens, 2))
    assert set(unrolled.names.pairs) == set(ours.keys())
    for site, other in unrolled.names.pairs.items():
        seen = ours[site].isfinite()  # TransformerLens hides keys by the lowest number
        bound = 1e-5 * float(ours[site][seen].abs().max().clamp(min=0.1))
        assert ours[site].shape == theirs[other].shape, site
        assert float((theirs[other] - ours[site])[seen].abs().max()) < bound, site


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_an_edit_at_any_site_does_the_same(name: str) -> None:
    """One run for all: every row of the batch is edited at another site."""
    model, unrolled = pair(name)
    pairs = unrolled.names.pairs
    tokens = prompts(model, batch=1, pos=4).expand(len(pairs), -1)

    def edit(row: int, site: str) -> Any:
        def write(x: Tensor, hook: Any) -> Tensor:
            x = x.clone()
            if site.endswith("attn_scores"):
                x[row, :, :, 0] += 1  # a key that every query sees
            else:
                x[row, 1] = 1.3 * x[row, 1] + 0.1
            return x

        return write

    hooks = [(site, edit(row, site)) for row, site in enumerate(pairs)]
    ours = model.run_with_hooks(tokens, 2, fwd_hooks=hooks)
    theirs = unrolled.run_with_hooks(tokens, fwd_hooks=[(pairs[site], hook) for site, hook in hooks])
    plain = model(tokens[:1], 2)
    scale = ours.abs().amax()
    for site, one, other in zip(pairs, ours, theirs, strict=True):
        assert float((one - other).abs().max()) < 2e-5 * float(scale.clamp(min=1)), site
        if not site.endswith(("hook_scale", *DEAD_ENDS)):  # another norm may come after a scale
            assert float((one - plain[0]).abs().max()) > 1e-6, site


@pytest.mark.parametrize("name", MODELS)
def test_every_gradient_is_the_same(name: str) -> None:
    model, unrolled = pair(name)
    tokens = prompts(model, pos=4)
    weights = noise_like(torch.empty(model.cfg.d_vocab))
    pairs = {a: b for a, b in unrolled.names.pairs.items() if not any(a.endswith(end) for end in DEAD_ENDS)}
    ours: dict[str, Tensor] = {}
    theirs: dict[str, Tensor] = {}

    def keep(store: dict[str, Tensor], site: str) -> Any:
        return lambda grad, hook: store.__setitem__(site, grad.detach().clone())

    with model.hooks(bwd_hooks=[(site, keep(ours, site)) for site in pairs]):
        (model(tokens, 2) @ weights).sum().backward()
    with unrolled.hooks(bwd_hooks=[(other, keep(theirs, site)) for site, other in pairs.items()]):
        (unrolled(tokens) @ weights).sum().backward()
    model.zero_grad()
    assert set(ours) == set(theirs) == set(pairs)
    largest = max(float(grad.abs().max()) for grad in ours.values())
    for site, grad in ours.items():
        assert grad.shape == theirs[site].shape, site
        bound = 1e-4 * float(grad.abs().max()) + 1e-5 * largest
        assert float((grad - theirs[site]).abs().max()) < bound, site


def test_every_folder_of_stored_numbers_has_a_view() -> None:
    assert set(STORED) == {folder.name for folder in PARITY.iterdir() if folder.is_dir()}


def test_a_view_of_a_model_trained_with_prefixes_says_how_it_is_given_one() -> None:
    model = named("hrm-text")
    with pytest.warns(UserWarning, match=r"runs causally: pass attention_mask= of \[batch, query, key\]"):
        unrolled = model.unrolled()
    tokens, who = prompts(model), torch.ones(2, 5, 5).tril().bool()
    who[:, :3, :3] = True
    with torch.no_grad():
        assert_same("prefix", unrolled(tokens, attention_mask=who), model(tokens, prefix_length=3))


@pytest.mark.parametrize("name", ["ff-gemma3", "ff-gpt2", "nanochat", "albert"])
@torch.no_grad()
def test_padding_and_positions_are_read_as_the_looped_model_reads_them(name: str) -> None:
    model, unrolled = pair(name)
    tokens, mask = tokens_for(model), torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    for options in ({"attention_mask": mask}, {"position_ids": torch.arange(5).expand(2, -1).clone() + 2}):
        assert_same("logits", unrolled(tokens, **options), model(tokens, 2, **options))


def test_what_predicts_a_next_token_refuses_where_tokens_see_both_ways() -> None:
    model, unrolled = pair("albert")
    tokens = tokens_for(model)
    for call in (lambda: unrolled(tokens, return_type="loss"), lambda: unrolled.loss_fn(unrolled(tokens), tokens)):
        with pytest.raises(InputError, match="the loss of the next token needs a model that reads from left to right"):
            call()
    for call in (unrolled.generate, unrolled.generate_stream):
        with pytest.raises(InputError, match="generating text needs a model that reads from left to right"):
            call(tokens, max_new_tokens=1)


def test_a_seed_and_a_state_of_the_view_are_those_of_its_runs() -> None:
    model = parity("huginn")
    clean, _ = short_prompts(model)
    with torch.no_grad():
        state = model(clean, stop_at_loop=1)
        assert_same("seed", model.unrolled(2, seed=3)(clean), model(clean, 2, seed=3))
        for given in (state, state[0]):
            assert_same("state", model.unrolled(2, initial_state=given)(clean), model(clean, 2, initial_state=given))


# Where it can't hold, it says why.


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("huginn", "its layers normalise the residual stream itself"),
        ("ouro", "the residual stream is normalised between loops"),
        ("retrofit-llama", "the prelude's output is mixed in again in every loop"),
        ("retrofit-olmo2", "the prelude's output is mixed in again in every loop"),
        ("added", "the prelude's output is mixed in again in every loop"),
    ],
)
def test_sums_that_do_not_hold_are_refused(name: str, reason: str) -> None:
    model, unrolled = pair(name)
    _, cache = unrolled.run_with_cache(short_prompts(model)[0])
    for part in (cache, cache.apply_slice_to_batch_dim(0)):
        for method in ("decompose_resid", "stack_head_results", "get_full_resid_decomposition"):
            message = f"{method} adds up .* {model.cfg.family} model: {reason}. Use the states"
            with pytest.raises(InputError, match=message):
                getattr(part, method)()
        with pytest.raises(InputError, match=reason):
            part.stack_neuron_results(1)
        with pytest.raises(InputError, match=f"logit_attrs adds up .*{reason}"):
            part.logit_attrs(part.accumulated_resid(), 3)
    with pytest.raises(InputError, match=f"{reason}. Use tl_looped.patching.path_patch, which reaches across loops"):
        unrolled.set_use_split_qkv_input(True)
    with pytest.raises(InputError, match=reason):
        unrolled.all_composition_scores("Q")
    assert cache.accumulated_resid(incl_mid=True).shape[0] == 2 * unrolled.cfg.n_layers + 1


@pytest.mark.parametrize("loop_norm", ["each", "last"])
def test_sums_of_other_choices_are_refused(loop_norm: str) -> None:
    model = make(n_coda=1, loop_norm=loop_norm)
    _, cache = model.unrolled(1).run_with_cache(short_prompts(model)[0])
    with pytest.raises(InputError, match="normalised before the coda"):
        cache.decompose_resid()


def test_sums_of_a_run_from_a_given_state_are_refused() -> None:
    model, clean = case("bare"), short_prompts(case("bare"))[0]
    state = noise_like(model(clean, stop_at_loop=1))
    _, cache = model.unrolled(initial_state=state).run_with_cache(clean)
    with pytest.raises(InputError, match="its loops started from a state that was given"):
        cache.decompose_resid()


def test_one_loop_of_ouro_adds_up_but_not_by_head() -> None:
    model = parity("ouro")
    unrolled, (clean, _) = model.unrolled(1), short_prompts(model)
    with torch.no_grad():
        _, cache = unrolled.run_with_cache(clean)
        assert_same("sum", cache.decompose_resid().sum(0), cache["resid_post", -1])
    for method in ("stack_head_results", "get_full_resid_decomposition"):
        with pytest.raises(InputError, match=f"{method} adds up.* a norm after attention mixes the heads"):
            getattr(cache, method)()
    with pytest.raises(InputError, match="exit gate reads the norm before the head too.* Use fold_ln=False"):
        unrolled.enable_compatibility_mode()
    unrolled.enable_compatibility_mode(fold_ln=False)
    assert_same("not folded", unrolled(clean).log_softmax(-1), model(clean, 1).log_softmax(-1))


def test_a_run_goes_on_from_a_residual_stream_where_nothing_else_is_read() -> None:
    model, unrolled = pair("retrofit-llama")
    clean, _ = short_prompts(model)
    last = model.cfg.n_prelude + model.cfg.n_core
    with torch.no_grad():
        logits, cache = unrolled.run_with_cache(clean)
        for layer in (last, last + 1, -1):
            assert_same("logits", unrolled(cache["resid_pre", layer], start_at_layer=layer), logits)
        for layer in (0, last - 1, -1 - model.cfg.n_coda - model.cfg.n_core):
            with pytest.raises(InputError, match=rf"start_at_layer={layer} .* Use looped\(tokens, start_at_loop="):
                unrolled(cache["resid_pre", layer], start_at_layer=layer)


@pytest.mark.parametrize("name", ["ouro", "ouro-gqa"])
def test_ouros_last_closing_norm_is_the_views_final_norm(name: str) -> None:
    model = parity(name)
    clean, _ = short_prompts(model)
    unrolled = model.unrolled(3)
    assert unrolled.names.to_depth("loop.2.ln_loop.hook_scale") == "ln_final.hook_scale"
    assert unrolled.names.to_depth("loop.1.ln_loop.hook_scale") == "loop.1.ln_loop.hook_scale"
    assert unrolled.names.to_looped("ln_final.hook_scale") == "loop.2.ln_loop.hook_scale"
    with torch.no_grad():
        logits, cache = unrolled.run_with_cache(clean)
        assert_same("lens", cache.logit_lens(positions=None).values[-1], logits)
        assert_same("tool", tools.logit_lens(unrolled, clean, positions=None).values[-1], logits)


@pytest.mark.parametrize("name", CASES)
def test_the_logit_lens_of_the_last_layer_gives_the_logits(name: str) -> None:
    model, unrolled = pair(name)
    with torch.no_grad():
        logits, cache = unrolled.run_with_cache(short_prompts(model)[0])
        assert_same("lens", cache.logit_lens(positions=None).values[-1], logits)


@pytest.mark.parametrize("name", ["retrofit-llama", "ouro"])
def test_a_cache_of_the_looped_model_under_the_views_names(name: str) -> None:
    model, unrolled = pair(name)
    clean, _ = short_prompts(model)
    with torch.no_grad():
        ours = run_clean(model, clean, 2)
        cache = unrolled.view(ours)
        assert_same("lens", cache.logit_lens(positions=None).values[-1], model(clean, 2))
    assert cache["resid_pre", -1] is ours[unrolled.names.to_looped(f"blocks.{len(unrolled.blocks) - 1}.hook_in")]
    with pytest.raises(InputError, match="the cache is of 3 loops, the view of 2: make a view like the run"):
        unrolled.view(run_clean(model, clean, 3))


def test_a_cache_of_two_stacks_with_other_counts_is_not_renamed() -> None:
    model = named("hrm-text")
    tokens, unrolled = prompts(model), model.unrolled((2, 3))
    with torch.no_grad():
        cache = unrolled.view(run_clean(model, tokens, (2, 3)))
        assert_same("last", cache["resid_post", -1], unrolled.run_with_cache(tokens)[1]["resid_post", -1])
    for counts, message in (((2, 2), r"\(2, 2\) loops"), ((1, 3), r"\(1, 3\) loops")):
        with pytest.raises(InputError, match=rf"is of {message}, the view of \(2, 3\): make a view like the run"):
            unrolled.view(run_clean(model, tokens, counts))


@pytest.mark.parametrize("name", ["ff-gemma2", "ouro", "nanochat-recursive", "hrm-text"])
@torch.no_grad()
def test_a_copy_of_a_view_is_a_view_of_a_copy(name: str) -> None:
    model, unrolled = pair(name)
    tokens = prompts(model)
    twin = copy.deepcopy(unrolled)
    sites = ("hook_resid_pre", "attn.hook_z", "attn.hook_pattern", "hook_mlp_out", "hook_resid_post")
    names = [f"blocks.{depth}.{site}" for depth in (0, len(twin.blocks) - 1) for site in sites]
    hooks = [(name, lambda x, hook: x * 1.2) for name in names]
    edited = unrolled.run_with_hooks(tokens, fwd_hooks=hooks)
    assert not torch.allclose(edited, unrolled(tokens), atol=1e-4)
    assert torch.equal(twin.run_with_hooks(tokens, fwd_hooks=hooks), edited)
    twin.blocks[0].mlp.out.weight[0].mul_(3)  # not all of it, which a norm behind would undo
    assert torch.equal(twin(tokens), twin.looped(tokens, 2))
    assert torch.equal(unrolled(tokens), model(tokens, 2))
    assert not torch.allclose(twin(tokens), unrolled(tokens), atol=1e-4)


def test_a_last_norm_before_a_head_without_one_is_the_views_final_norm() -> None:
    model = make(loop_norm="last", final_norm=False)
    unrolled = model.unrolled(2)
    unrolled.enable_compatibility_mode()
    with torch.no_grad():
        logits, cache = unrolled.run_with_cache(short_prompts(model)[0])
        assert_same("lens", cache.logit_lens(positions=None).values[-1], logits)
        assert_same("logit", cache.logit_attrs(cache.decompose_resid(), 3).sum(0), logits[..., 3])


@pytest.mark.parametrize(
    ("changes", "how"),
    [
        ({"final_norm": False}, "no norm"),
        ({"final_norm": False, "loop_norm": "last", "n_coda": 1}, "no norm"),
        ({"final_norm": True, "loop_norm": "last"}, "two norms"),
        ({"final_norm": True, "loop_norm": "each"}, "two norms"),
    ],
)
def test_a_head_that_does_not_read_through_one_norm_is_refused(changes: dict[str, Any], how: str) -> None:
    model = make(**changes)
    unrolled, (clean, _) = model.unrolled(1), short_prompts(model)
    logits, cache = unrolled.run_with_cache(clean)
    assert_same("logits", logits, model(clean, 1))
    ours = run_clean(model, clean, 1)
    assert all(unrolled.names.pairs[name] in unrolled.hook_dict for name in ours)
    message = f"the head's norm, but .* reads the last layer's output through {how}. Use looped.readout of states"
    with pytest.raises(InputError, match=message):
        cache.accumulated_resid(apply_ln=True)
    with pytest.raises(ValueError, match="exposes no `ln_final` component"):
        cache.logit_lens()
    assert cache.accumulated_resid(layer=1, apply_ln=True).shape[0] == 2


def test_direct_path_patching_is_refused_with_what_to_use() -> None:
    model, unrolled = pair("huginn")
    clean, corrupted = short_prompts(model)
    caches = (unrolled.run_with_cache(tokens)[1] for tokens in (clean, corrupted))
    with pytest.raises(InputError, match=r"split q, k, v input adds up.*Use tl_looped.patching.path_patch"):
        patching.get_act_patch_direct_path(unrolled, corrupted, *caches, lambda logits: logits.sum(), 0, 0)
    assert not unrolled.cfg.use_split_qkv_input


def test_transformerlenss_patching_on_the_looped_model_itself_is_an_error_and_no_number() -> None:
    model = parity("ouro")
    clean, corrupted = short_prompts(model)
    cache = run_clean(model, clean)
    with pytest.raises(AttributeError, match="LoopedConfig has no 'n_layers': cfg.n_prelude, cfg.n_core and"):
        patching.get_act_patch_resid_pre(model, corrupted, cache, lambda logits: logits.sum())


@pytest.mark.parametrize("name", ["added", "loopus-qwen3", "looped-gpt", "tiny huginn", "hrm-text"])
@torch.no_grad()
def test_an_edit_in_place_reaches_what_comes_after_it_alone(name: str) -> None:
    """The tensor that a loop is given is read again: by its update, by later injections, and by who made a state."""
    model, _ = pair(name)
    tokens = prompts(model)
    state = model(tokens, stop_at_loop=1)
    given = {"initial_state": state} if model.cfg.reads_input_in_loops else {}
    before, unrolled = state.clone(), model.unrolled(2, **given)

    def halve(x: Tensor, hook: Any) -> None:
        x.mul_(0.5)

    ends = ("hook_resid_pre", "hook_state_pre", "hook_state_init", "hook_injection", "hook_injection_in")
    for site, other in unrolled.names.pairs.items():
        if site.endswith(ends):
            ours = model.run_with_hooks(tokens, 2, fwd_hooks=[(site, halve)], **given)
            assert_same(site, unrolled.run_with_hooks(tokens, fwd_hooks=[(other, halve)]), ours)
    assert torch.equal(state, before)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("ff-gemma2", "takes the mean out of the logits.* a soft cap comes between .* Use center_unembed=False"),
        ("parcae", "folds norms into what reads them.* a gate in attention reads .* Use fold_ln=False"),
        ("loopformer", "folds norms into what reads them.* last norm is of another kind .* Use fold_ln=False"),
        ("albert", "takes the mean out of what is written.* Use center_writing_weights=False"),
    ],
)
def test_processing_that_would_change_the_output_is_refused_with_what_to_leave_out(name: str, message: str) -> None:
    model = named(name)
    for call in ("enable_compatibility_mode", "process_weights"):
        with pytest.raises(InputError, match=f"processing weights {message}"):
            getattr(model.unrolled(2), call)()
    unrolled, tokens = model.unrolled(2), tokens_for(model)
    left_out = {"fold_ln": False, "center_unembed": False, "center_writing_weights": False}
    unrolled.enable_compatibility_mode(**left_out)
    assert_same("processed", unrolled(tokens).log_softmax(-1), model(tokens, 2).log_softmax(-1))


@pytest.mark.parametrize("name", ["parcae", "loopformer", "hrm-text"])
def test_inputs_that_something_else_reads_are_not_split(name: str) -> None:
    _, unrolled = pair(name)
    with pytest.raises(InputError, match="use_attn_in gives every head an input of its own.* Use tl_looped.patching"):
        unrolled.set_use_attn_in(True)
    with pytest.raises(InputError, match="split q, k, v input adds up"):
        unrolled.set_use_split_qkv_input(True)


@pytest.mark.parametrize("name", ["ff-gpt2", "ff-gemma3", "looped-gpt", "retrofit-llama"])
@torch.no_grad()
def test_heads_with_inputs_of_their_own_compute_the_same(name: str) -> None:
    model = named(name)
    unrolled, tokens = model.unrolled(2), tokens_for(model)
    unrolled.set_use_attn_in(True)
    assert_same("attn_in", unrolled(tokens), model(tokens, 2))
    rolled = unrolled.run_with_hooks(tokens, fwd_hooks=[("blocks.1.attn.hook_attn_in", lambda x, hook: x.roll(1, -1))])
    assert not torch.allclose(rolled, unrolled(tokens), atol=1e-4)


@torch.no_grad()
def test_every_layer_of_a_view_runs_also_where_a_state_is_given_in_place_of_what_it_makes() -> None:
    model, tokens = named("loopus-qwen3"), tokens_for(named("loopus-qwen3"))
    state = model(tokens, stop_at_loop=1)
    unrolled = model.unrolled(2, initial_state=state)
    logits, cache = unrolled.run_with_cache(tokens)
    assert_same("logits", logits, model(tokens, 2, initial_state=state))
    assert cache.accumulated_resid().shape[0] == unrolled.cfg.n_layers + 1


def test_what_a_model_reads_beside_its_embeddings_is_asked_for() -> None:
    _, unrolled = pair("hrm-act")
    with pytest.raises(InputError, match=r"must begin with the tokens of one puzzle, .* looped.cfg.puzzle_tokens"):
        unrolled(torch.tensor([[1, 2, 3]]))
    model, unrolled = pair("parcae")
    assert model.cfg.reads_tokens_in_layers
    with pytest.raises(InputError, match="reads tokens, and here are vectors in their place: pass token ids"):
        unrolled(torch.zeros(1, 3, model.cfg.d_model))
    _, unrolled = pair("albert")
    for read in (lambda: unrolled.W_U, unrolled.tl_parameters):
        with pytest.raises(InputError, match="the residual stream to logits, but this is a albert model: its head"):
            read()


def test_vectors_in_place_of_tokens_and_a_run_that_stops_leave_nothing_behind() -> None:
    model, unrolled = pair("ff-gpt2")
    tokens = tokens_for(model)
    with torch.no_grad():
        vectors = model.W_E[tokens]
        assert_same("vectors", unrolled(vectors), model(tokens, 2))
        unrolled(vectors, stop_at_layer=0)
        assert_same("after", unrolled(tokens), model(tokens, 2))
