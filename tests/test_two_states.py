"""Two stacks that loop, each with a state of its own: counts, names, prefixes, and what asks for one core."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import PARITY, TINY, TWO_STATES, config, expected, fired, make, noise_like, parity, refuse, tokens_for
from safetensors.torch import save_file
from torch import Tensor
from transformers import HrmTextConfig, HrmTextForCausalLM

from tl_looped import HookNameError, InputError, LoopedCache, LoopedModel, LoopSchedule
from tl_looped.engine.kv import KVCache
from tl_looped.lens import LOSS, EntropyRule, view_prompt
from tl_looped.observe import observe

pytestmark = pytest.mark.filterwarnings("ignore:.*was trained with a prefix")


@pytest.fixture(scope="module")
def model() -> LoopedModel:
    """A tiny model: two layers in each stack, H 2, L 2."""
    return make(torch.float64, **TWO_STATES)


@pytest.fixture(scope="module")
def tokens(model: LoopedModel) -> Tensor:
    return tokens_for(model)


@pytest.fixture(scope="module")
def cache(model: LoopedModel, tokens: Tensor) -> LoopedCache:
    with torch.no_grad():
        return model.run_with_cache(tokens)[1]


# transformers' own model, in memory, as a reference.


def reference(folder: Path, **changes: Any) -> HrmTextForCausalLM:
    """transformers' model of a folder, with other counts of cycles."""
    values = json.loads((PARITY / "hrm-text" / "config.json").read_text()) | changes
    cycles = values["H_cycles"] * (values["L_cycles"] + 1)
    values["num_hidden_layers"] = values["num_layers_per_stack"] * cycles
    hf_config = HrmTextConfig(**values, attn_implementation="eager")
    return HrmTextForCausalLM.from_pretrained(folder, config=hf_config).eval()


@pytest.mark.parametrize("loops", [None, (3, 2), (1, 4)])
@pytest.mark.parametrize("with_prefix", [False, True])
def test_it_is_transformers_model_at_any_counts(loops: tuple[int, int] | None, with_prefix: bool):
    """Of prompts of different length, padded at the left."""
    counts = {} if loops is None else {"H_cycles": loops[0], "L_cycles": loops[1]}
    ids = expected("hrm-text")["input_ids"]
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    kinds = torch.zeros_like(ids)
    kinds[:, 4:8] = int(with_prefix)
    with torch.no_grad():
        theirs = reference(PARITY / "hrm-text", **counts)(ids, attention_mask=mask, token_type_ids=kinds).logits
        ours = parity("hrm-text")(ids, loops, attention_mask=mask, token_type_ids=kinds)
    torch.testing.assert_close(ours[mask.bool()], theirs[mask.bool()], rtol=1e-4, atol=2e-5)


def test_both_stored_forms_load(tmp_path: Path):
    """The released one, whose maps are fused, and that of transformers' modules."""
    ids = expected("hrm-text")["input_ids"]
    weights = {name: weight.clone() for name, weight in reference(PARITY / "hrm-text").state_dict().items()}
    assert any(name.endswith("self_attn.gate_proj.weight") for name in weights)
    save_file(weights, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text((PARITY / "hrm-text" / "config.json").read_text())
    unfused = LoopedModel.from_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(unfused(ids), parity("hrm-text")(ids))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_act": "gelu"}, "hidden_act='gelu', which is not implemented"),
        ({"attention_bias": True}, "attention_bias=True, which is not implemented"),
        ({"num_key_value_heads": 2}, "num_key_value_heads=2, which is not implemented: only 4 is"),
        ({"halting": 0.5}, "halting=0.5, which no hrm-text model here uses"),
        ({"H_cycles": None}, "has no 'H_cycles'"),
        ({"L_cycles": 0}, "two_states.l_cycles must be at least 1, got 0"),
    ],
)
def test_what_is_not_implemented_is_refused_by_name(released: Any, changes: dict[str, Any], message: str):
    refuse(released("hrm-text", changes), message)


def test_a_missing_scale_is_that_of_transformers(released: Any):
    folder = released("hrm-text", {"embedding_scale": None, "initializer_range": 0.25})
    assert LoopedModel.from_pretrained(folder).cfg.embed_scale == 4.0


# Counts.


def test_every_stack_has_a_flat_loop_count(model: LoopedModel, tokens: Tensor):
    layers = {name.split(".hook_")[0] for name in fired(model, tokens, (3, 2)) if name.endswith("hook_resid_pre")}
    of_l = {int(name.split(".")[3]) for name in layers if name.startswith("L_blocks")}
    of_h = {int(name.split(".")[3]) for name in layers if name.startswith("H_blocks")}
    assert (of_l, of_h) == (set(range(6)), set(range(3)))
    schedule = model.cfg.schedule((3, 2))
    assert schedule.coordinates("L_blocks", 3) == (1, 1)
    assert (schedule.loops_in("L_blocks", [0, 2]), schedule.around("L_blocks", [1, 4])) == ([0, 1, 4, 5], [0, 2])
    assert schedule.looping() == ("L_blocks", "H_blocks")


def test_an_integer_counts_loops_of_the_trained_kind(model: LoopedModel, tokens: Tensor):
    with torch.no_grad():
        assert torch.equal(model(tokens, 3), model(tokens, (3, 2)))
        assert not torch.equal(model(tokens, 3), model(tokens, (3, 1)))
        assert torch.equal(model(tokens, (2, 3), stop_at_loop=1), model(tokens, (4, 3), stop_at_loop=1))


@pytest.mark.parametrize(
    ("loops", "message"),
    [
        ((2, 0), "L of n_loops must be at least 1, got 0"),
        ((0, 2), "H of n_loops must be at least 1, got 0"),
        ((1, 2, 3), r"n_loops must be a number of loops, or the pair \(H, L\), got \(1, 2, 3\)"),
        (0, "n_loops must be at least 1, got 0"),
    ],
)
def test_wrong_counts_are_refused(model: LoopedModel, tokens: Tensor, loops: Any, message: str, as_a_user: None):
    with pytest.raises(InputError, match=message):
        model(tokens, loops)


def test_a_pair_for_one_core_is_refused():
    with pytest.raises(InputError, match=r"n_loops=\(2, 2\), but one stack loops in custom: pass one number of loops"):
        make(**TINY["ouro"])(torch.tensor([[1, 2]]), (2, 2))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n_coda": 1}, "n_coda=1 does not go with two_states"),
        ({"injection": "concat_linear"}, "injection='concat_linear' does not go with two_states"),
        ({"prefix_lm": True, "causal": False}, "prefix_lm=True says who sees whom"),
        ({"two_states": None, "halt_gate": True}, "puzzles and halt_gate are parts of models with two_states"),
        ({"loop_norm": "last"}, "loop_norm='last' does not go with two_states"),
    ],
)
def test_parts_of_one_state_are_refused(changes: dict[str, Any], message: str):
    with pytest.raises(InputError, match=message):
        config(**{**TWO_STATES, **changes})


def test_a_config_comes_back_from_json(model: LoopedModel):
    assert type(model.cfg).from_dict(json.loads(json.dumps(model.cfg.to_dict()))) == model.cfg


# Names.


def test_a_cache_is_read_by_stack(cache: LoopedCache, model: LoopedModel, tokens: Tensor):
    name = "L_blocks.1.loop.3.hook_resid_post"
    assert torch.equal(cache["L_blocks.resid_post", 1, 3], cache[name])
    assert torch.equal(cache["L_blocks.resid_post", -1, -1], cache[name])
    assert torch.equal(cache["H_blocks.state_post", -1], cache["H_blocks.loop.1.hook_state_post"])
    assert torch.equal(cache["L_blocks.scale", 1, 3, "ln1"], cache["L_blocks.1.loop.3.ln1.hook_scale"])
    assert cache.stack("L_blocks.pattern").shape[:2] == (4, 2)
    assert cache.stack("H_blocks.ln_loop.scale").shape[0] == 2
    assert cache.loops("L_blocks.resid_post", 0) == [0, 1, 2, 3]
    drawn = cache.plot("L_blocks.resid_post")
    assert [len(line.x) for line in drawn.data] == [4, 4]
    one = cache.apply_slice_to_loops(1)
    assert torch.equal(one.stack("L_blocks.state_post"), cache.stack("L_blocks.state_post")[2:])
    _, kept = model.run_with_cache(tokens, loops=[-1], names_filter=["L_blocks.0.hook_resid_pre", "hook_embed"])
    assert [*kept] == ["hook_embed", "L_blocks.0.loop.2.hook_resid_pre", "L_blocks.0.loop.3.hook_resid_pre"]


@pytest.mark.parametrize(
    ("key", "message"),
    [
        (
            ("resid_post", 0, 0),
            "'resid_post' is at two places in custom, where L_blocks and H_blocks loop: say 'L_blocks.resid_post' or "
            "'H_blocks.resid_post'",
        ),
        (("state_post", 0), "say 'L_blocks.state_post' or 'H_blocks.state_post'"),
        ("attn.pattern", "say 'L_blocks.attn.pattern' or 'H_blocks.attn.pattern'"),
        (("L_blocks.resid_post", 0, 4), "loop 4 is out of range: 4 exist"),
        (("H_blocks.resid_post", 0, 2), "loop 2 is out of range: 2 exist"),
        (("L_blocks.resid_post", 0), "fires once in every loop: say which"),
        ("L_blocks.embed", "'hook_embed' belongs to no layer: leave 'L_blocks' out"),
    ],
)
def test_a_name_without_its_stack_is_an_error_that_names_them(cache: LoopedCache, key: Any, message: str):
    with pytest.raises(HookNameError, match=message):
        cache[key]


def test_a_cache_is_kept_in_a_file(cache: LoopedCache, model: LoopedModel, tmp_path: Path):
    loaded = LoopedCache.load(cache.save(tmp_path / "cache.safetensors"), model)
    assert loaded.run.counts == (2, 2)
    assert torch.equal(loaded.stack("L_blocks.state_post"), cache.stack("L_blocks.state_post"))


def test_hooks_act_at_a_loop_of_their_stack(model: LoopedModel, tokens: Tensor):
    seen: list[str] = []
    hooks: list[Any] = [("L_blocks.0.loop.3.hook_resid_pre", lambda x, hook: seen.append(hook.name))]
    hooks.append(("H_blocks.hook_state_post", lambda x, hook: seen.append(hook.name)))
    model.run_with_hooks(tokens, fwd_hooks=hooks)
    assert seen == ["H_blocks.loop.0.hook_state_post", hooks[0][0], "H_blocks.loop.1.hook_state_post"]
    with pytest.raises(HookNameError, match="a hook is on 'L_blocks.0.loop.4.hook_resid_pre', which this run does not"):
        model.run_with_hooks(tokens, fwd_hooks=[("L_blocks.0.loop.4.hook_resid_pre", lambda x, hook: None)])
    with pytest.raises(HookNameError, match="no hook point 'blocks.0.hook_resid_pre'. Nearest: '._blocks.0"):
        model.add_hook("blocks.0.hook_resid_pre", lambda x, hook: None)


def test_sites_are_what_the_equations_say(cache: LoopedCache, model: LoopedModel):
    """z_L ← N(L(z_L + z_H)), then z_H ← N(H(z_H + z_L)); the gate is on what o reads."""
    for stack, other in (("L_blocks", "hook_state_pre"), ("H_blocks", "hook_state_post")):
        for t in range(2):
            flat = 2 * t if stack == "L_blocks" else t
            at = f"{stack}.loop.{flat}."
            sees = f"H_blocks.loop.{t}.{other}" if stack == "L_blocks" else f"L_blocks.loop.{2 * t + 1}.{other}"
            assert torch.equal(cache[f"{at}hook_injection_in"], cache[sees])
            assert torch.equal(cache[f"{at}hook_injection"], cache[f"{at}hook_state_pre"] + cache[sees])
            out = cache[f"{stack}.1.loop.{flat}.hook_resid_post"]
            normed = out / (out.pow(2).mean(-1, keepdim=True) + model.cfg.eps).sqrt()
            torch.testing.assert_close(cache[f"{at}hook_state_post"], normed)
    layer = "H_blocks.0.loop.1.attn."
    weighted = torch.einsum("bhqk,bkhd->bqhd", cache[f"{layer}hook_pattern"], cache[f"{layer}hook_v"])
    torch.testing.assert_close(cache[f"{layer}hook_z"], weighted * cache[f"{layer}hook_gate"])


# States.


def test_what_goes_from_loop_to_loop_is_both_states(cache: LoopedCache, model: LoopedModel, tokens: Tensor):
    with torch.no_grad():
        state = model(tokens, stop_at_loop=1)
        assert torch.equal(state, torch.cat([cache[f"{s}_blocks.state_post", t] for s, t in (("H", 0), ("L", 1))], -1))
        assert torch.equal(model.readout(state, tokens), model(tokens, 1))
        assert torch.equal(model.readout(cache["H_blocks.state_post", 0], tokens), model(tokens, 1))
        assert torch.equal(model(tokens, initial_state=state, start_at_loop=1), model(tokens))
    shape = r"\(2, 5, 32\) = \[batch, pos, 2 \* d_model\]"
    with pytest.raises(InputError, match=rf"initial_state must be a tensor of shape {shape}, got \(2, 5, 16\)"):
        model(tokens, initial_state=state[..., :16], start_at_loop=1)


def test_patching_what_differs_restores_the_clean_output(model: LoopedModel, tokens: Tensor):
    other = tokens.clone()
    other[:, 2] = (other[:, 2] + 1) % model.cfg.d_vocab
    with torch.no_grad():
        clean, cache = model.run_with_cache(other)
        for name in ("hook_embed", "H_blocks.loop.0.hook_state_pre"):
            put = [(name, lambda x, hook: cache[hook.name].clone())]
            assert torch.equal(model.run_with_hooks(tokens, fwd_hooks=put), clean)


def test_the_given_state_has_a_gradient(model: LoopedModel, tokens: Tensor):
    """Through all cycles: against finite differences."""
    state = model(tokens, stop_at_loop=0).detach().requires_grad_()
    model(tokens, initial_state=state, return_type="loss").backward()
    move = noise_like(state)
    with torch.no_grad():
        ends = [model(tokens, initial_state=state + s * 1e-6 * move, return_type="loss") for s in (1, -1)]
    assert state.grad is not None
    assert float((ends[0] - ends[1]) / 2e-6) == pytest.approx(float((state.grad * move).sum()), rel=1e-4)


# Prefixes.


def test_a_prefix_is_who_sees_whom(model: LoopedModel):
    tokens = tokens_for(model, batch=2, pos=6)
    sees = torch.ones(6, 6).tril().expand(2, 6, 6).clone()
    sees[0, :4, :4], sees[1, :2, :2] = 1, 1
    kinds = torch.tensor([[1, 1, 1, 1, 0, 0], [1, 1, 0, 0, 0, 0]])
    encoded = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "token_type_ids": kinds}
    with torch.no_grad():
        full = model(tokens, attention_mask=sees)
        for found in (model(tokens, prefix_length=[4, 2]), model(tokens, token_type_ids=kinds), model(encoded)):
            torch.testing.assert_close(found, full)
        assert not torch.allclose(model(tokens), full)
        alone = model(tokens[:1, :4], prefix_length=3)
        mask = torch.tensor([[1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 1]])
        padded = model(tokens, prefix_length=[3, 0], attention_mask=mask)
    torch.testing.assert_close(padded[:1, :4], alone)


def test_the_loss_leaves_out_what_is_seen(model: LoopedModel, tokens: Tensor):
    """Tokens of a prefix, which their predecessors see: the first that counts is the one behind it."""
    with torch.no_grad():
        logits = model(tokens, prefix_length=[3, 0])
        each = -logits[:, :-1].log_softmax(-1).gather(-1, tokens[:, 1:, None])[..., 0]
        counts = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]])
        options: dict[str, Any] = {"prefix_length": [3, 0], "return_type": "loss"}
        torch.testing.assert_close(model(tokens, **options), (each * counts).sum() / 6)
        torch.testing.assert_close(model(tokens, **options, loss_per_token=True), each * counts)
        seen = observe(model, tokens, prefix_length=[3, 0], measures=[LOSS], progress=False)
    torch.testing.assert_close(seen["loss"][:, -1], (each * counts).sum(-1) / counts.sum(-1))
    with pytest.raises(InputError, match="needs at least two tokens: .* and a prefix that leaves one"):
        model(tokens, prefix_length=5, return_type="loss")
    with pytest.raises(InputError, match="tokens of a prefix see each other, so they are not predicted"):
        view_prompt(model, tokens[:1], prefix_length=2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prefix_length": 6}, "prefix_length is 6, but prompt 0 has 5 tokens: pass no more"),
        ({"prefix_length": [5, 9]}, "prefix_length is 9, but prompt 1 has 5 tokens"),
        ({"prefix_length": [5]}, "prefix_length has 1 lengths for 2 prompts: pass one for each"),
        ({"prefix_length": 2.5}, "prefix_length must be an integer, got 2.5"),
        ({"prefix_length": -1}, "prefix_length must be at least 0, got -1"),
        ({"prefix_length": 1, "token_type_ids": torch.ones(2, 5)}, "say the same: leave one out"),
        ({"token_type_ids": torch.ones(2, 4)}, r"of shape \(2, 5\) = \[batch, pos\], 1 for tokens .* \(2, 4\)"),
        ({"token_type_ids": torch.full((2, 5), 2)}, "token_type_ids must be of zeros and ones"),
        ({"prefix_length": 1, "attention_mask": torch.ones(2, 5, 5)}, "who sees whom in full: leave out prefix_length"),
    ],
)
def test_a_wrong_prefix_is_refused(
    model: LoopedModel, tokens: Tensor, options: dict[str, Any], message: str, as_a_user: None
):
    with pytest.raises(InputError, match=message):
        model(tokens, **options)


def test_a_model_without_prefixes_refuses_one():
    with pytest.raises(InputError, match="custom was not trained with prefixes .*leave out prefix_length, or say who"):
        make(**TINY["ouro"])(torch.tensor([[1, 2]]), prefix_length=1)


def test_that_a_run_is_causal_is_said_once():
    model = make(**TWO_STATES)
    with pytest.warns(UserWarning, match="custom was trained with a prefix .* so it runs causally: pass prefix_length"):
        model(torch.tensor([[1, 2]]))
    model(torch.tensor([[1, 2]]))  # a second one would be an error here


@pytest.mark.parametrize("length", [3, 6])
def test_generation_goes_on_from_a_prefix(model: LoopedModel, length: int):
    """With the cache as without, of prompts of different length; and looked at loop by loop."""
    tokens, mask = tokens_for(model, pos=6), torch.ones(2, 6, dtype=torch.long)
    mask[0, :2] = 0
    options: dict[str, Any] = {"do_sample": False, "stop_at_eos": False, "verbose": False, "attention_mask": mask}
    options |= {"prefix_length": [min(length, 4), length], "n_loops": (2, 3)}
    whole = model.generate(tokens, 4, **options, use_past_kv_cache=False)
    assert torch.equal(model.generate(tokens, 4, **options), whole)
    ends: dict[int, Tensor] = {}

    def watch(end: Any, position: int) -> None:
        if position == 5 and end.loop == 1:
            ends[position] = end.log_probs

    assert torch.equal(model.generate(tokens, 4, **options, watch=watch), whole)
    said = model(tokens, (2, 3), attention_mask=mask, prefix_length=options["prefix_length"]).detach()[:, -1]
    torch.testing.assert_close(ends[5], said.log_softmax(-1))


def test_an_exit_rule_stops_whole_loops(model: LoopedModel):
    """A token that stops after loop 0 says what a run of one loop says."""
    tokens = tokens_for(model, pos=6)
    options: dict[str, Any] = {"do_sample": False, "stop_at_eos": False, "verbose": False, "prefix_length": 6}
    at_once = model.generate(tokens, 1, (3, 2), **options, exit_rule=EntropyRule(100.0), return_type="result")
    assert at_once.loops.tolist() == [[1], [1]]
    assert torch.equal(at_once.tokens, model.generate(tokens, 1, (1, 2), **options))
    never = model.generate(tokens, 4, (3, 2), **options, exit_rule=EntropyRule(1e-9))
    assert torch.equal(never, model.generate(tokens, 4, (3, 2), **options))


def test_later_loops_find_the_keys_of_the_last_one_that_ran():
    """Row 0 stopped after loop 0, row 1 after loop 1: each pass of a later loop finds the same pass of that loop."""
    kv = KVCache(LoopSchedule.nested(1, 3, 2), 4)
    for loop in range(6):
        kv.extend(("L_blocks", 0), loop, torch.full((2, 1, 1, 1), float(loop)), torch.zeros(2, 1, 1, 1))
    kv.share(torch.tensor([0, 1]))
    kv.commit(1)
    keys = [kv.extend(("L_blocks", 0), t, torch.zeros(2, 1, 1, 1), torch.zeros(2, 1, 1, 1))[0][:, 0] for t in range(6)]
    assert torch.stack(keys).flatten(1).T.tolist() == [[0, 1, 0, 1, 0, 1], [0, 1, 2, 3, 2, 3]]
