"""Parts that one family brought, beyond its stored numbers: what follows from them, and what is refused by name."""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any

import pytest
import torch
from helpers import PARITY, config, expected, make, refuse, tokens_for
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

from tl_looped import InputError, LoopedCache, LoopedModel
from tl_looped.attention import attention_bound
from tl_looped.engine.words import describe
from tl_looped.lens import (
    ENTROPY,
    KL_TO_FINAL,
    LOSS,
    GateChanceRule,
    GateRule,
    logit_lens,
    readout_agreement,
    trace_exits,
)
from tl_looped.observe import observe
from tl_looped.patching import attribution_sweep, patch_sweep
from tl_looped.report import Prompt, collect
from tl_looped.stages import neuron_shares
from tl_looped.stages.neurons import logit_effects

# Looped-GPT.


def test_the_plain_pass_is_the_core_once_more_also_where_a_map_was_replaced():
    model = LoopedModel.from_pretrained(PARITY / "looped-gpt")
    core, coda = model.transformer.blocks[0], model.transformer.coda[0]
    assert coda.attn.q is core.attn.q and coda.ln1 is core.ln1
    assert not any(name.startswith("coda") for name, _ in model.transformer.named_parameters())
    core.attn.q = nn.Sequential(core.attn.q, nn.Identity())  # as an adapter does
    assert coda.attn.q is core.attn.q


def test_scores_divided_by_layer_are_those_of_transformers(tmp_path):
    sizes: dict[str, Any] = {"n_embd": 16, "n_head": 2, "n_layer": 3, "vocab_size": 24, "n_positions": 16}
    theirs = GPT2LMHeadModel(GPT2Config(**sizes, scale_attn_by_inverse_layer_idx=True)).eval()
    theirs.set_attn_implementation("eager")
    with torch.no_grad():
        for weight in theirs.parameters():
            weight.copy_(0.5 * torch.randn_like(weight))
        theirs.save_pretrained(tmp_path)
        model = LoopedModel.from_pretrained(tmp_path)
        tokens = tokens_for(model)
        wanted = theirs(tokens, output_attentions=True)
        logits, cache = model.run_with_cache(tokens)
    torch.testing.assert_close(logits, wanted.logits, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(cache.stack("pattern")[0], torch.stack(wanted.attentions), rtol=1e-5, atol=1e-5)
    assert "scales that differ by layer" in model.cfg.score_terms()
    assert "scores divided by the layer's number" in dict(describe(model.cfg))["attention"]


def test_the_plain_pass_divides_scores_as_the_core_does():
    cfg = config(n_core=2, n_coda=2, coda_is_core=True, scores_by_layer=True, n_prelude=1)
    assert [cfg.score_scale(*layer) for layer in cfg.layers()] == [0.5, 0.25, 0.5 / 3, 0.25, 0.5 / 3]
    with pytest.raises(InputError, match="coda_is_core=True runs the 2 core layers once more, so n_coda must be 2"):
        config(n_core=2, n_coda=1, coda_is_core=True)


def test_a_residual_update_adds_the_state_again():
    model = make(torch.float64, loop_update="residual")
    _, cache = model.run_with_cache(tokens_for(model), 2)
    torch.testing.assert_close(cache["state_post", 0], cache["state_pre", 0] + cache["core_out", 0])
    assert "adds what its layers make of the state" in str(model.cfg.sum_broken_by(2))
    assert not model.cfg.resumes_in_loop and model.cfg.readout_broken_by() is not None


def test_layernorms_without_bias():
    model = make(norm="layer_no_bias")
    x = torch.randn(3, 16)
    norm = model.transformer.blocks[0].ln1
    torch.testing.assert_close(norm(x), nn.functional.layer_norm(x, (16,), norm.weight, eps=1e-6))


def test_what_looped_gpt_refuses(released):
    refuse(released("looped-gpt", {"recurrent_refinement": False}), "recurrent_refinement=False, which is not impl")


def test_one_pass_is_no_loop(released):
    refuse(released("looped-gpt", {"loop_steps": 1}), "loop_steps=1: the one pass through the layers is then the plain")


# LoopUS.


def test_a_gate_decides_how_far_the_state_moves():
    model = make(torch.float64, loop_update="gated", gate_rank=2)
    _, cache = model.run_with_cache(tokens_for(model), 2)
    before, after, gate = (cache[name, 1] for name in ("state_pre", "core_out", "update_gate"))
    own = model.transformer.update_gate
    step = nn.functional.softplus((after - before) @ own.inner.weight.T @ own.outer.weight.T + own.outer.bias)
    torch.testing.assert_close(gate, torch.exp(-step * torch.exp(own.log_rate)))
    torch.testing.assert_close(cache["state_post", 1], gate * after + (1 - gate) * before)
    assert "a gate decides how far" in str(model.cfg.sum_broken_by(2)) and not model.cfg.resumes_in_loop
    shut = [("hook_update_gate", lambda x, hook: 0 * x)]  # no loop moves the state
    stays = model.run_with_hooks(tokens_for(model), 2, fwd_hooks=shut)
    torch.testing.assert_close(stays, model.readout(cache["hook_state_init"], tokens_for(model)))


def test_an_exit_gate_may_read_a_norm_and_judge_each_loop_by_itself():
    model = make(torch.float64, exit_gate=True, exit_norm=True)
    tokens = tokens_for(model)
    _, cache = model.run_with_cache(tokens, 3)
    norm, states = model.transformer.exit_norm, cache.stack("state_post")
    read = nn.functional.layer_norm(states, (16,), norm.weight, norm.bias, eps=1e-5)
    torch.testing.assert_close(cache.stack("exit_gate"), model.transformer.exit_gate(read).squeeze(-1))
    trace = trace_exits(model, tokens, 3, rules=[GateChanceRule, GateRule])
    chance = cache.stack("exit_gate").sigmoid().flatten(1)
    torch.testing.assert_close(trace.statistics[0], chance)
    torch.testing.assert_close(trace.statistics[1], 1 - (1 - chance).cumprod(0))
    with pytest.raises(InputError, match="has no exit gate, so GateChanceRule can't judge it"):
        trace_exits(make(), tokens, 3, rules=[GateChanceRule])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"loop_update": "gated"}, "gate_rank=None belongs to loop_update='gated'"),
        ({"gate_rank": 2}, "gate_rank=2 belongs to loop_update='gated', got 'replace'"),
        ({"exit_norm": True}, "it needs exit_gate=True"),
    ],
)
def test_parts_that_need_each_other(changes: dict[str, Any], message: str):
    with pytest.raises(InputError, match=message):
        config(**changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"base_config_dict": {"model_type": "gemma2"}}, "base_config_dict.model_type='gemma2', which is not impl"),
        ({"halting_strategy": "vote"}, "halting_strategy='vote', which is not implemented"),
        ({"decoder_layer_indices": [9]}, r"decoder_layer_indices=\[9\], but the base has 5 layers"),
        ({"hidden_size": 41}, "hidden_size=41, which is not implemented: only 40"),
    ],
)
def test_what_loopus_refuses(released, changes: dict[str, Any], message: str):
    refuse(released("loopus-qwen3", changes), message)


def test_an_older_form_of_loopus_is_refused_by_name(released):
    def rename(weights: dict[str, torch.Tensor]) -> None:
        for name in [name for name in weights if name.startswith("reasoning.")]:
            weights[name.replace("reasoning.", "plateau.")] = weights.pop(name)

    refuse(released("loopus-qwen3", {}, rename), "says 'plateau.': rename these to 'reasoning.'")


def test_a_negative_index_of_loopus_is_that_layer_and_all_after_it(released):
    model = LoopedModel.from_pretrained(released("loopus-qwen3", {"decoder_layer_indices": [-4]}))
    assert model.schedule.describe() == "prelude 2, blocks 2 x 4 loops, coda 1"


# Parcae.


def test_a_diagonal_injection_shrinks_the_state_and_adds_the_input():
    model = make(torch.float64, n_prelude=1, injection="diagonal", state_out=True)
    tokens, part = tokens_for(model), model.transformer.injection
    _, cache = model.run_with_cache(tokens, 2)
    step = torch.log1p(part.step_bias.exp())
    decay = torch.exp(-step * part.log_rate.exp())
    torch.testing.assert_close(cache["injection_decay", 1], decay.expand(2, 5, -1))
    torch.testing.assert_close(cache["injection_step", 1], step.expand(2, 5, -1))
    wanted = decay * cache["state_pre", 1] + step * (cache["injection_in", 1] @ part.input.weight.T)
    torch.testing.assert_close(cache["injection", 1], wanted)
    edit = [("loop.1.hook_injection_decay", lambda x, hook: x.index_fill(1, torch.tensor([0]), 0))]  # at one position
    _, edited = model.run_with_cache(tokens, 2), model.run_with_hooks(tokens, 2, fwd_hooks=edit)
    assert not torch.equal(edited[:, 0], model(tokens, 2)[:, 0])


def test_a_linear_map_after_the_loops_is_part_of_every_read_out():
    model = make(torch.float64, n_prelude=1, injection="diagonal", state_out=True)
    tokens, through = tokens_for(model), model.transformer.state_out.weight
    logits, cache = model.run_with_cache(tokens, 2)
    torch.testing.assert_close(cache["hook_state_out"], cache["state_post", 1] @ through.T)
    torch.testing.assert_close(model.transformer.unembed(model.transformer.head_input(cache["state_post", 1])), logits)
    for kind in ("exact", "direct"):
        assert float(logit_lens(model, tokens, 2, kind=kind).kl_to_final[-1].abs().max()) < 1e-12
    assert "a linear map of the last layer's output" in str(model.cfg.readout_broken_by())
    core = logit_effects(model.transformer.blocks[1].mlp.W_out @ through.T, model.W_U, True)
    shares = neuron_shares(model, min_kurtosis=0.1, fold=False)
    torch.testing.assert_close(shares.kurtosis[2], core.kurtosis)
    with pytest.raises(InputError, match="state_out=True goes with loop_norm='none', got 'each'"):
        config(state_out=True, loop_norm="each")


def test_values_have_the_tokens_own_embedding_by_a_gate():
    model = make(torch.float64, value_embeds=(False, True), value_gate_size=6, n_key_value_heads=2)
    tokens, attn = tokens_for(model), model.transformer.blocks[1].attn
    _, cache = model.run_with_cache(tokens, 2)
    read = model.transformer.blocks[1].ln1.affine(cache["ln1.normalized", 1, 1])
    gate = 2 * torch.sigmoid(read[..., :6] @ attn.value_gate.weight.T)
    torch.testing.assert_close(cache["value_gate", 1, 1], gate)
    own = attn.value_embed.weight[tokens].unflatten(-1, (2, 4))
    torch.testing.assert_close(cache["value_embed", 1, 0], own)
    torch.testing.assert_close(cache["v", 1, 1], attn.v(read).unflatten(-1, (2, 4)) + gate[..., None] * own)
    assert "blocks.0.attn.hook_value_gate" not in model.hook_dict
    _, corrupted = cache, tokens.flip(0)
    with pytest.raises(
        InputError, match="layers of custom read tokens themselves, by value embeddings: leave out n_steps"
    ):
        metric = lambda logits: logits[:, -1, 0].sum()  # noqa: E731
        attribution_sweep(model, corrupted, 2, source=cache, metric=metric, n_steps=2, progress=False)
    with pytest.raises(InputError, match="value_embeds must have one entry for each of 2 layers, got 1"):
        config(value_embeds=(True,))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"recurrent_embedding_dimension": 64}, "recurrent_embedding_dimension=64, which is not implemented: only 40"),
        ({"injection_type": "linear"}, "injection_type='linear', which is not implemented"),
        ({"init_strategy": "takase"}, "init_strategy='takase', which is not implemented"),
        ({"rope_settings": {"use_rope": True, "rope_base": 10000}}, "freqs_cis differs by .* of base 10000"),
        ({"clip_qkv": 3.0}, "clip_qkv=3.0, which no parcae model here uses"),
        ({"num_key_value_heads": 2}, "num_key_value_heads=2 for 4 heads, which core layers here never share"),
    ],
)
def test_what_parcae_refuses(released, changes: dict[str, Any], message: str):
    refuse(released("parcae", changes), message)


def test_a_gate_without_a_table_is_never_read(released):
    model = LoopedModel.from_pretrained(released("parcae", {}, lambda weights: weights.pop("value_embeds.3.weight")))
    assert model.cfg.value_embeds == (False, True, False, False, False, True)


# LoopFormer.


@lru_cache
def timed() -> LoopedModel:
    """Two layers that the loop's time modulates, in float64."""
    return make(torch.float64, loop_time=True, norm="weightless", final_norm_kind="rms")


def test_layers_are_gated_and_scaled_by_the_time_of_the_loop():
    model, steps = timed(), [0.5, 0.3, 0.1]
    tokens, block = tokens_for(model), model.transformer.blocks[1]
    _, cache = model.run_with_cache(tokens, 3, step_sizes=steps)
    condition = model.transformer.time_embed(torch.tensor(0.8).double()) + model.transformer.step_embed(
        torch.tensor(0.1).double()
    )
    torch.testing.assert_close(cache["condition", 2], condition.expand(2, 5, -1))
    modulation = block.modulation(nn.functional.silu(condition))
    torch.testing.assert_close(cache["modulation", 1, 2], modulation.expand(2, 5, -1))
    gate_attn, gate_mlp, scale_attn, scale_mlp = modulation.chunk(4)
    for ln, scale in (("ln1", scale_attn), ("ln2", scale_mlp)):
        torch.testing.assert_close(cache[f"{ln}.modulated", 1, 2], cache[f"{ln}.normalized", 1, 2] * (1 + scale))
    torch.testing.assert_close(cache["attn_out", 1, 2], gate_attn * block.attn.o(cache["z", 1, 2].flatten(2)))
    torch.testing.assert_close(cache["mlp_out", 1, 2], gate_mlp * block.mlp.down(cache["post", 1, 2]))


def test_the_waves_of_a_time():
    embed, t = timed().transformer.time_embed, torch.tensor(0.3, dtype=torch.float64)
    waves = [10000.0 ** (-j / 128) for j in range(128)]
    read = torch.tensor([math.cos(0.3 * f) for f in waves] + [math.sin(0.3 * f) for f in waves], dtype=torch.float64)
    torch.testing.assert_close(embed(t), embed.outer(nn.functional.silu(embed.inner(read))), rtol=1e-6, atol=1e-6)


def test_edits_of_time_act_at_their_positions_and_loops():
    model, tokens = timed(), tokens_for(timed())
    plain = model(tokens, 3)

    def late(x: torch.Tensor, hook: Any) -> torch.Tensor:
        x[:, 3:] += 1
        return x

    for name in ("loop.1.hook_condition", "blocks.0.loop.1.hook_modulation", "blocks.1.loop.0.ln2.hook_modulated"):
        edited = model.run_with_hooks(tokens, 3, fwd_hooks=[(name, late)])
        torch.testing.assert_close(edited[:, :3], plain[:, :3])
        assert not torch.allclose(edited[:, 3:], plain[:, 3:]), name


def test_steps_are_of_the_run_everywhere():
    model, steps = timed(), [0.5, 0.3, 0.1]
    tokens = tokens_for(model)
    logits, cache = model.run_with_cache(tokens, 3, step_sizes=steps)
    assert torch.equal(model(tokens, 3), model(tokens, 3, step_sizes=[1 / 3] * 3))
    assert not torch.equal(model(tokens, 3), logits)
    assert cache.run.step_sizes == (0.5, 0.3, 0.1) and cache.run.describe()["step_sizes"] == steps
    state = model(tokens, 3, step_sizes=steps, stop_at_loop=1)
    assert torch.equal(model(tokens, 3, step_sizes=steps, initial_state=state, start_at_loop=1), logits)
    lens = logit_lens(model, tokens, 3, step_sizes=steps)
    assert float(lens.kl_to_final[-1].abs().max()) < 1e-12 and lens.made_by["step_sizes"] == steps
    prepared = model.prepare([[3, 4, 5], [6, 7, 8, 9]], 3, step_sizes=steps)
    alone = model([[3, 4, 5]], 3, step_sizes=steps)
    torch.testing.assert_close(model(prepared)[0, :3], alone[0])
    found = model.generate(tokens, 3, n_loops=3, step_sizes=steps, do_sample=False, stop_at_eos=False, verbose=False)
    whole = tokens
    for _ in range(3):
        whole = torch.cat((whole, model(whole, 3, step_sizes=steps)[:, -1:].argmax(-1)), dim=1)
    assert torch.equal(found.tokens if hasattr(found, "tokens") else found, whole)


def test_patching_with_steps_is_patching_cell_by_cell():
    model, steps = timed(), [0.5, 0.3, 0.1]
    tokens = tokens_for(model)
    _, source = model.run_with_cache(tokens.flip(1), 3, step_sizes=steps)
    metric = lambda logits: logits[:, -1, 0].sum()  # noqa: E731
    options: dict[str, Any] = {"source": source, "metric": metric, "axes": ("loop", "layer"), "progress": False}
    found = patch_sweep(model, tokens, 3, step_sizes=steps, **options).values
    for t in range(3):
        for layer in range(2):
            name = f"blocks.{layer}.loop.{t}.hook_resid_pre"
            edit = [(name, lambda x, hook: source[hook.name])]
            wanted = metric(model.run_with_hooks(tokens, 3, step_sizes=steps, fwd_hooks=edit))
            torch.testing.assert_close(found.squeeze()[t, layer], wanted)
    with pytest.raises(InputError, match=r"the source's loops took steps \(0.5, 0.3, 0.1\), this run's"):
        patch_sweep(model, tokens, 3, **options)


@pytest.mark.parametrize(
    ("steps", "message"),
    [
        ([0.5, 0.5], "step_sizes has 2 step sizes, but the run has 3 loops: pass one for each, or n_loops=2"),
        ([0.5, 0.5, "x"], "a step in step_sizes must be a finite number above 0, got 'x'"),
        ([0.5, 0.5, 0.0], "a step in step_sizes must be a finite number above 0, got 0.0"),
        (0.5, "step_sizes must be a list of step sizes, one for each loop, got 0.5"),
    ],
)
def test_steps_that_can_not_be(as_a_user, steps: Any, message: str):
    with pytest.raises(InputError, match=message):
        timed()(tokens_for(timed()), 3, step_sizes=steps)


def test_what_a_time_of_loops_breaks_is_refused():
    model, tokens = timed(), tokens_for(timed())
    with pytest.raises(InputError, match="the loops of custom have no time, so leave out step_sizes"):
        make()(tokens, 2, step_sizes=[0.5, 0.5])
    with pytest.raises(InputError, match="no one weight can be folded in: pass fold=False"):
        neuron_shares(model, min_kurtosis=0.1)
    assert "a gate that changes with the loop" in str(model.cfg.heads_mixed_by())
    with pytest.raises(InputError, match="loop_time=True goes with norm_placement='pre'"):
        config(loop_time=True, norm_placement="output")


def test_a_cache_with_steps_is_kept_and_read_again(tmp_path):
    model = timed()
    _, cache = model.run_with_cache(tokens_for(model), 2, step_sizes=[0.5, 0.2])
    cache.save(tmp_path / "cache")
    assert LoopedCache.load(tmp_path / "cache", model).run.step_sizes == (0.5, 0.2)


def test_the_bound_reads_what_the_queries_read():
    model = timed()
    bound = attention_bound(model, tokens_for(model, batch=1), 3)
    assert bool((bound.plain[1:] <= bound.bound[1:] * (1 + 1e-9)).all()) and bound.breaks == (
        "rotary position embedding",
    )


# ALBERT.


@lru_cache
def both_ways() -> LoopedModel:
    """ALBERT's parity model in float64."""
    return LoopedModel.from_pretrained(PARITY / "albert", dtype=torch.float64)


def test_a_norm_on_the_stream_with_none_before_it():
    model = make(torch.float64, norm_placement="post", norm="layer")
    _, cache = model.run_with_cache(tokens_for(model), 2)
    block = model.transformer.blocks[1]
    torch.testing.assert_close(
        cache["resid_mid", 1, 1], block.ln1_post(cache["resid_pre", 1, 1] + cache["attn_out", 1, 1])
    )
    torch.testing.assert_close(
        cache["resid_post", 1, 1], block.ln2_post(cache["resid_mid", 1, 1] + cache["mlp_out", 1, 1])
    )
    assert "normalise the residual stream itself" in str(model.cfg.sum_broken_by(1))


def test_tokens_see_each_other_and_no_padding():
    model, tokens = both_ways(), torch.tensor([[5, 6, 7, 0, 0], [8, 9, 10, 11, 12]])
    mask = torch.tensor([[1, 1, 1, 0, 0], [1] * 5])
    _, cache = model.run_with_cache(tokens, attention_mask=mask)
    pattern = cache.stack("pattern")[:, 0]
    assert bool((pattern[:, 1] > 0).all()) and float(pattern[:, 0, :, :3, 3:].abs().max()) == 0
    full = torch.ones(2, 5, 5).tril()  # who sees whom in full is as it is given
    _, masked = model.run_with_cache(tokens, attention_mask=full)
    assert torch.equal(masked.stack("pattern"), masked.stack("pattern").tril())


def test_read_outs_go_through_the_heads_transform():
    model = both_ways()
    tokens, part = tokens_for(model), model.transformer.head_transform
    logits, cache = model.run_with_cache(tokens, 3)
    made = part.norm(
        nn.functional.gelu(cache["state_post", 2] @ part.inner.weight.T + part.inner.bias, approximate="tanh")
    )
    torch.testing.assert_close(cache["hook_head_in"], made)
    torch.testing.assert_close(logits, made @ model.W_E.T + model.transformer.unembed.bias)
    for kind in ("exact", "direct"):
        lens = logit_lens(model, tokens, 3, kind=kind, site="resid_post")
        assert float(lens.kl_to_final[-1].abs().max()) < 1e-12
    assert readout_agreement(model, tokens, 3).to_dataframe().shape[0]
    assert trace_exits(model, tokens, 3).n_loops == 3
    observed = observe(model, tokens, 3, measures=[ENTROPY, KL_TO_FINAL])
    assert float(observed.mean("kl_to_final")[-1].abs().max()) < 1e-12
    edit = [("hook_head_in", lambda x, hook: 0 * x)]
    flat = model.run_with_hooks(tokens, 3, fwd_hooks=edit)
    torch.testing.assert_close(flat, model.transformer.unembed.bias.expand_as(flat))


def test_analyses_hold_in_both_directions():
    model = both_ways()
    tokens = tokens_for(model, batch=1)
    bound = attention_bound(model, tokens, 3)
    assert bool((bound.plain[1:] <= bound.bound[1:] * (1 + 1e-9)).all())
    _, source = model.run_with_cache(tokens.flip(1), 3)
    metric = lambda logits: logits[:, 0, 0].sum()  # noqa: E731
    found = patch_sweep(model, tokens, 3, source=source, metric=metric, axes=("loop", "pos"), progress=False).values
    edit = [("blocks.0.loop.1.hook_resid_pre", lambda x, hook: torch.cat((x[:, :4], source[hook.name][:, 4:]), dim=1))]
    wanted = metric(model.run_with_hooks(tokens, 3, fwd_hooks=edit))
    torch.testing.assert_close(found.squeeze()[1, 4], wanted)  # what comes later reaches the first token
    assert float((wanted - metric(model(tokens, 3))).abs().detach()) > 1e-6


def test_what_reading_both_ways_breaks_is_refused():
    model, tokens = both_ways(), tokens_for(both_ways())
    for what, call in {
        "the loss of the next token": lambda: model(tokens, return_type="loss"),
        "measure 'loss'": lambda: observe(model, tokens, measures=[LOSS]),
        "generating text": lambda: model.generate(tokens, 2),
        "the report": lambda: collect(model, [Prompt(token_ids=(3, 4))]),
    }.items():
        with pytest.raises(InputError, match=f"{what} needs a model that reads from left to right, but .*albert"):
            call()
    with pytest.raises(InputError, match="reads the stream through a map with an activation function, so a neuron's"):
        neuron_shares(model, min_kurtosis=0.1)
    with pytest.raises(InputError, match="token_type_ids has tokens of another kind than 0, which is not implemented"):
        model(tokens, token_type_ids=torch.ones_like(tokens))
    with pytest.raises(InputError, match="token_type_ids has tokens of another kind"):
        model({"input_ids": tokens, "token_type_ids": torch.ones_like(tokens)})
    given = {"input_ids": tokens, "token_type_ids": torch.zeros_like(tokens)}
    assert torch.equal(model(given), model(tokens))
    with pytest.raises(InputError, match="d_embed=8 needs head_transform=True"):
        config(d_embed=8)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_hidden_groups": 2}, "num_hidden_groups=2, which is not implemented: only 1"),
        ({"hidden_act": "relu"}, "hidden_act='relu', which is not implemented"),
        ({"tie_word_embeddings": False}, "tie_word_embeddings=False, which is not implemented"),
    ],
)
def test_what_albert_refuses(released, changes: dict[str, Any], message: str):
    refuse(released("albert", changes), message)


def test_what_is_stored_beside_albert_changes_nothing(released):
    def more(weights: dict[str, torch.Tensor]) -> None:
        weights["albert.pooler.weight"] = torch.ones(40, 40)
        weights["predictions.decoder.weight"] = weights["albert.embeddings.word_embeddings.weight"].clone()

    model = LoopedModel.from_pretrained(released("albert", {}, more))
    plain = LoopedModel.from_pretrained(PARITY / "albert")
    assert torch.equal(model(tokens_for(model)), plain(tokens_for(model)))


# MobileLLM.


def test_a_layer_twice_in_a_row_is_one_layers_weights_at_two_sites():
    model = make(torch.float64, n_core=4, layer_repeats=2)
    first, again, other = (model.transformer.blocks[layer] for layer in (0, 1, 2))
    assert again.attn.q is first.attn.q and again.ln2 is first.ln2 and other.attn.q is not first.attn.q
    tokens = tokens_for(model)
    _, cache = model.run_with_cache(tokens, 1)
    frame = model.frame(cache.run)
    torch.testing.assert_close(cache["resid_post", 1, 0], first(first(cache["resid_pre", 0, 0], frame, 0), frame, 0))
    edited = model.run_with_hooks(tokens, 1, fwd_hooks=[("blocks.1.attn.hook_z", lambda x, hook: 0 * x)])
    assert not torch.equal(edited, model(tokens, 1))  # the second call alone
    assert dict(describe(model.cfg))["layers"] == "each 2 times in a row"
    with pytest.raises(InputError, match=r"n_core \(3\) must be a multiple of layer_repeats \(2\)"):
        config(n_core=3, layer_repeats=2)


def test_without_sharing_mobilellm_runs_each_layer_once(released):
    model = LoopedModel.from_pretrained(released("mobilellm-ls", {"layer_sharing": False}))
    assert model.schedule.describe() == "blocks 3 x 1 loops"
    torch.testing.assert_close(model(expected("mobilellm-ls")["input_ids"]), expected("mobilellm-ls")["once.logits"])
