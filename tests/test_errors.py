"""What a user gets wrong is said before any work, with what was seen and what mends it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import TINY, config, fired, hook_count, make, tiny, tokens_for

from tl_looped import HookNameError, InputError, LoadError, LoopedError, LoopedModel

pytestmark = pytest.mark.usefixtures("as_a_user")


@pytest.fixture(scope="module")
def model() -> LoopedModel:
    """A model with all that a family can have; its hooks and its embedding tell whether anything ran."""
    return make(**TINY["huginn"], n_loops=4)


class Ran(Exception):
    """Something was computed."""


def refuse(model: LoopedModel, message: str, *args: Any, error: type[Exception] = InputError, **options: Any) -> None:
    """The call raises before the model computes anything, and leaves no hook behind."""
    tokens = args[0] if args else tokens_for(model)

    def ran(*_: Any) -> None:
        raise Ran

    handles = [module.register_forward_pre_hook(ran) for module in (model.transformer, model.transformer.embed)]
    try:
        with pytest.raises(error, match=message):
            model.run_with_hooks(tokens, *args[1:], **options)
    finally:
        for handle in handles:
            handle.remove()
    assert hook_count(model) == 0
    assert model.context_level == 0


def keep(x, hook):
    """A hook that does nothing."""


# Names.


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("blocks.0.hook_resid_pst", r"no hook point 'blocks.0.hook_resid_pst'. Nearest: 'blocks.0.hook_resid_post'"),
        (
            "blocks.2.hook_resid_post",
            r"no hook point 'blocks.2.hook_resid_post'. Nearest: 'blocks.[01].hook_resid_post'",
        ),
        (
            "blocks.0.loop.1.hook_resid_pst",
            r"no hook point 'blocks.0.loop.1.hook_resid_pst'. Nearest: 'blocks.0.hook_re",
        ),
        ("blocks.0.attn.hook_patern", r"Nearest: 'blocks.0.attn.hook_pattern'.*model.hook_dict lists all of them"),
        ("hook_exit_gate", r"this model has no hook point 'hook_exit_gate'"),
        ("ln_loop.hook_scale", r"this model has no hook point 'ln_loop.hook_scale'.*'ln_coda.hook_scale'"),
        ("hook_pos_embed", r"this model has no hook point 'hook_pos_embed'. Nearest: 'hook_embed'"),
        ("embed", r"'embed' does not have the form of a hook name, such as 'blocks.2.loop.3.attn.hook_z'"),
        ("transformer.embed", r"does not have the form of a hook name"),
        ("prelude.0.loop.1.hook_resid_post", r"'prelude.0.hook_resid_post' fires once in a run.*leave the loop out of"),
        ("loop.0.hook_embed", r"'hook_embed' fires once in a run, not in every loop: leave the loop out"),
        (
            "blocks.0.loop.4.hook_resid_post",
            r"a hook is on 'blocks.0.loop.4.*this run does not reach: loops 0 to 3 run",
        ),
        ("loop.99.hook_state_pre", r"a hook is on 'loop.99.hook_state_pre', which this run does not reach"),
        (
            lambda name: name == "blocks.0.hook_resid_post",
            r"the function <function .*> accepts no hook name that this run",
        ),
        (lambda name: "loop.7" in name, r"accepts no hook name that this run reaches"),
    ],
)
@pytest.mark.parametrize("direction", ["fwd_hooks", "bwd_hooks"])
def test_names_that_do_not_run(model, name, message, direction):
    refuse(model, message, error=HookNameError, **{direction: [(name, keep)]})


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("loop.3.hook_state_pre", {"n_loops": 3}),
        ("loop.2.hook_state_pre", {"stop_at_loop": 2}),
        ("loop.1.hook_state_pre", {"stop_at_loop": 0}),
        ("hook_state_post", {"stop_at_loop": 0}),
        ("coda.0.hook_resid_post", {"stop_at_loop": 2}),
        ("ln_coda.hook_scale", {"stop_at_loop": -1}),
        ("ln_final.hook_normalized", {"stop_at_loop": 4}),
        ("loop.1.hook_state_pre", {"start_at_loop": 2}),
        ("hook_state_init", {"start_at_loop": 1}),
    ],
)
def test_sites_of_parts_that_do_not_run(model, name, options):
    if "start_at_loop" in options:
        options["initial_state"] = torch.zeros(2, 5, 16)
    refuse(model, f"a hook is on '{name}', which this run does not reach", fwd_hooks=[(name, keep)], **options)
    with pytest.raises(HookNameError, match=f"nothing to cache at '{name}'"):
        model.run_with_cache(tokens_for(model), names_filter=name, **options)


@pytest.mark.parametrize("name", ["hook_embed"])
def test_tokens_that_are_not_read(name):
    """Ouro started from a state never looks at its tokens."""
    ouro = tiny("ouro")
    state = torch.zeros(2, 5, 16)
    assert "hook_embed" not in fired(ouro, tokens_for(ouro), initial_state=state)
    refuse(
        ouro, r"a hook is on 'hook_embed', which this run does not reach", fwd_hooks=[(name, keep)], initial_state=state
    )


def test_a_registered_hook_is_checked_in_every_run(model):
    model.add_hook("loop.3.hook_state_pre", keep)
    with pytest.raises(HookNameError, match=r"on 'loop.3.hook_state_pre', which this run does not reach: loops 0 to 1"):
        model(tokens_for(model), n_loops=2)
    model.reset_hooks()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: m.add_hook(3, keep), r"a hook's name must be a string or a function on names, got 3"),
        (lambda m: m.add_hook("hook_embed", keep, "sideways"), r"direction must be 'fwd' or 'bwd', got 'sideways'"),
        (lambda m: m.hook_dict["hook_embd"], r"no hook point 'hook_embd'. Nearest: 'hook_embed'"),
        (lambda m: m.hook_dict["hook_embed"].add_hook(keep, alias_names=["a"]), r"alias_names is not supported"),
    ],
)
def test_registering(model, call, message):
    with pytest.raises(InputError, match=message):
        call(model)
    assert hook_count(model) == 0


# Loops.


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n_loops": 0}, r"n_loops must be at least 1, got 0"),
        ({"n_loops": -3}, r"n_loops must be at least 1, got -3"),
        ({"n_loops": True}, r"n_loops must be an integer, got True \(bool\)"),
        ({"n_loops": 2.0}, r"n_loops must be an integer, got 2.0 \(float\)"),
        ({"n_loops": "2"}, r"n_loops must be an integer, got '2' \(str\)"),
        ({"n_loops": [2]}, r"n_loops must be an integer, got \[2\] \(list\)"),
        ({"start_at_loop": 1}, r"start_at_loop=1 needs initial_state: the state that a run stopped there returned"),
        ({"start_at_loop": -1}, r"start_at_loop=3 needs initial_state"),
        ({"start_at_loop": 4}, r"start_at_loop 4 is out of range: 4 exist, so it must lie in \[-4, 3\]"),
        ({"start_at_loop": 5, "n_loops": 5}, r"start_at_loop 5 is out of range: 5 exist"),
        ({"start_at_loop": -5}, r"start_at_loop -5 is out of range"),
        ({"start_at_loop": "1"}, r"start_at_loop must be an integer, got '1' \(str\)"),
        ({"start_at_loop": True}, r"start_at_loop must be an integer, got True \(bool\)"),
        ({"stop_at_loop": 5}, r"stop_at_loop 5 is out of range: 4 exist"),
        ({"stop_at_loop": -5}, r"stop_at_loop -5 is out of range"),
        ({"stop_at_loop": 1.5}, r"stop_at_loop must be an integer, got 1.5 \(float\)"),
        ({"stop_at_loop": True, "n_loops": 1}, r"stop_at_loop must be an integer, got True \(bool\)"),
        ({"start_at_loop": 3, "stop_at_loop": 1}, r"stop_at_loop 1 comes before start_at_loop 3: no loop would run"),
    ],
)
def test_loops(model, options, message):
    refuse(model, message, **options)


# States and seeds.


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"initial_state": torch.zeros(2, 5, 8)},
            r"initial_state must be a tensor of shape \(2, 5, 16\) = \[batch, pos, d_",
        ),
        (
            {"initial_state": torch.zeros(2, 4, 16)},
            r"of shape \(2, 5, 16\) = \[batch, pos, d_model\], got \(2, 4, 16\)",
        ),
        ({"initial_state": torch.zeros(1, 5, 16)}, r"got \(1, 5, 16\)"),
        ({"initial_state": torch.zeros(16)}, r"got \(16,\)"),
        ({"initial_state": [[0.0]]}, r"initial_state must be a tensor of shape \(2, 5, 16\) .* got list"),
        (
            {"initial_state": torch.zeros(2, 5, 16).double()},
            r"initial_state is torch.float64, the model torch.float32: pass",
        ),
        (
            {"initial_state": torch.zeros(2, 5, 16).long()},
            r"initial_state is torch.int64, .* pass state.to\(torch.float32\)",
        ),
        (
            {"initial_state": torch.zeros(2, 5, 16), "seed": 3},
            r"initial_state and seed both given: the state is either",
        ),
        ({"seed": -1}, r"seed must be an integer of at least 0, got -1"),
        ({"seed": 1.0}, r"seed must be an integer of at least 0, got 1.0"),
        ({"seed": True}, r"seed must be an integer of at least 0, got True"),
        ({"seed": "0"}, r"seed must be an integer of at least 0, got '0'"),
    ],
)
def test_states_and_seeds(model, options, message):
    refuse(model, message, **options)


@pytest.mark.parametrize(
    ("state", "message"),
    [
        (torch.zeros(2, 5, 8), r"must be a tensor of shape \(2, 5, 16\) = \[batch, pos, d_model\], got \(2, 5, 8\)"),
        (torch.zeros(2, 5, 16).half(), r"is torch.float16, the model torch.float32: pass state.to\(torch.float32\)"),
    ],
)
def test_states_to_read_out(model, state, message):
    with pytest.raises(InputError, match=message):
        model.readout(state, tokens_for(model))


# Tokens.


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        (torch.tensor([[24]]), r"token id 24 is out of the vocabulary \[0, 24\)"),
        (torch.tensor([[3, -1]]), r"token id -1 is out of the vocabulary \[0, 24\)"),
        (torch.tensor([[1.0, 2.0]]), r"tokens must be integers, got dtype torch.float32: pass token ids, or text"),
        (torch.tensor([[True]]), r"tokens must be integers, got dtype torch.bool"),
        (torch.zeros(1, 0).long(), r"tokens must be \[batch, pos\] with at least one token, got shape \(1, 0\)"),
        (torch.zeros(0, 3).long(), r"with at least one token, got shape \(0, 3\)"),
        (torch.tensor(5), r"tokens must be \[batch, pos\] with at least one token, got shape \(\)"),
        (torch.zeros(1, 1, 1).long(), r"got shape \(1, 1, 1\)"),
        (torch.zeros(1, 33).long(), r"the prompt has 33 tokens, more than the model's context of 32: shorten it"),
        ("text", r"this model has no tokenizer, so it can't read text: pass token ids, or set model.tokenizer"),
        (["text"], r"this model has no tokenizer"),
        (None, r"prompts must be text, token ids, messages, a list of these"),
        ([[1, 2], 3], r"prompt 1 must be text, a list of token ids or messages, got 3"),
    ],
)
def test_tokens(model, tokens, message):
    refuse(model, message, tokens)
    with pytest.raises(InputError, match=message):
        model.run_with_cache(tokens)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"attention_mask": torch.ones(2, 4)},
            r"attention_mask must have the shape of the tokens, \(2, 5\) = \[batch, pos\], got \(2, 4\)",
        ),
        ({"attention_mask": torch.ones(5)}, r"attention_mask must have shape \(2, 5\).*got \(5,\)"),
        ({"attention_mask": torch.ones(2, 1, 5, 5)}, r"attention_mask must have shape .* got \(2, 1, 5, 5\)"),
        (
            {"position_ids": torch.arange(5)},
            r"position_ids must be integers .* of shape \(2, 5\), got torch.int64 of shape \(5,\)",
        ),
        ({"position_ids": torch.zeros(2, 5)}, r"position_ids must be integers of at least 0 .*, got torch.float32 of"),
        ({"position_ids": torch.full((2, 5), -1)}, r"position_ids must be integers of at least 0 .*, some negative"),
        ({"return_type": "logit"}, r"return_type must be 'logits', 'loss', 'both' or None, got 'logit'"),
        ({"return_type": "state"}, r"return_type must be .* got 'state'"),
    ],
)
def test_masks_positions_and_return_types(model, options, message):
    refuse(model, message, **options)


def test_positions_without_an_embedding_are_refused():
    learned = make(learned_positions=True, rotary=None)
    positions = torch.tensor([[0, 1, learned.cfg.n_ctx]])
    message = rf"position_ids go up to {learned.cfg.n_ctx}, but the model has embeddings of {learned.cfg.n_ctx}"
    refuse(learned, message, torch.tensor([[1, 2, 3]]), position_ids=positions)
    assert learned(torch.tensor([[1, 2, 3]]), position_ids=positions - 1 + (positions == 0)).isfinite().all()


def test_additive_masks_are_refused(model):
    """Their zeros mean "seen", where ours mean "not"."""
    additive = torch.zeros(2, 5)
    additive[:, 0] = -torch.inf
    refuse(model, r"attention_mask must be of zeros and ones: 1 for tokens that are seen", attention_mask=additive)


# Options that contradict each other.


@pytest.mark.parametrize(
    ("args", "options", "message"),
    [
        (
            (torch.tensor([[1]]),),
            {"return_type": "loss"},
            r"the loss needs at least two tokens: one to read and one to",
        ),
        ((), {"return_type": "both", "attention_mask": torch.eye(5)[[0, 4]]}, r"the loss needs at least two tokens"),
        ((), {"return_type": "loss", "stop_at_loop": 2}, r"a run with stop_at_loop returns a state, so it has no loss"),
        ((), {"return_type": "both", "stop_at_loop": 2}, r"leave out stop_at_loop, or return_type='both'"),
        ((), {"loss_per_token": True}, r"loss_per_token needs return_type 'loss' or 'both', got 'logits'"),
        ((), {"initial_state": torch.zeros(2, 5, 16), "seed": 0}, r"initial_state and seed both given"),
    ],
)
def test_contradictions(model, args, options, message):
    refuse(model, message, *args, **options)


# Configs.


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"d_model": 0}, r"d_model must be at least 1, got 0"),
        ({"d_model": 16.0}, r"d_model must be an integer, got 16.0 \(float\)"),
        ({"n_core": 0}, r"n_core must be at least 1, got 0"),
        ({"n_loops": True}, r"n_loops must be an integer, got True"),
        ({"n_prelude": -1}, r"n_prelude must be at least 0, got -1"),
        ({"n_key_value_heads": 3}, r"n_heads \(4\) must be a multiple of n_key_value_heads \(3\)"),
        ({"n_key_value_heads": 0}, r"n_key_value_heads must be at least 1, got 0"),
        ({"d_head": 5}, r"d_head must be even for rotary embedding, got 5, of"),
        ({"norm_placement": "behind"}, r"norm_placement must be one of \('pre', .*\), got 'behind'"),
        ({"act_fn": "swish"}, r"act_fn must be one of \('silu', .*\), got 'swish'"),
        ({"injection": "mul"}, r"injection must be one of .*, got 'mul'"),
        ({"loop_norm": None}, r"loop_norm must be one of .*, got None"),
        ({"state_init": "random"}, r"state_init must be one of .*, got 'random'"),
        ({"eps": 0}, r"eps must be a finite number above 0, got 0"),
        ({"eps": float("nan")}, r"eps must be a finite number above 0, got nan"),
        ({"embed_scale": "1"}, r"embed_scale must be a finite number above 0, got '1'"),
        ({"state_init": "zeros"}, r"state_init='zeros' without injection would never read the tokens: take"),
        ({"state_init": "normal"}, r"state_init='normal' without injection would never"),
    ],
)
def test_configs(changes, message):
    with pytest.raises(InputError, match=message):
        config(**changes)


# The errors themselves.


def test_kinds_of_error():
    for kind in (InputError, HookNameError, LoadError):
        assert issubclass(kind, LoopedError)
        assert issubclass(kind, ValueError)
        assert str(kind("'a' is wrong")) == "'a' is wrong"  # a KeyError would show it in quotes
    assert issubclass(HookNameError, KeyError)
    assert str(HookNameError()) == ""


def test_a_wrong_call_leaves_the_model_as_it_was(model):
    tokens = tokens_for(model)
    before = model(tokens)
    for options in ({"n_loops": 0}, {"fwd_hooks": [("hook_embed", keep), ("nonsense", keep)]}, {"seed": -1}):
        with pytest.raises(InputError, match=r"n_loops must|does not have the form|seed must"):
            model.run_with_hooks(tokens, **options)
    assert torch.equal(model(tokens), before)
