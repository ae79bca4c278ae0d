"""HRM and TRM: two states, no causal mask, rows of a puzzle before the prompt."""

from __future__ import annotations

import json
from functools import lru_cache
from typing import Any

import pytest
import torch
from helpers import PARITY, expected, hook_count, noise_like, refuse
from torch import Tensor

from tl_looped import InputError, LoopedCache, LoopedModel
from tl_looped.engine.words import describe
from tl_looped.lens import LOSS, logit_lens, view_prompt
from tl_looped.observe import observe
from tl_looped.patching import patch_sweep
from tl_looped.report import check

FOLDERS = ("hrm-act", "trm")
every_folder = pytest.mark.parametrize("folder", FOLDERS)
H, STEPS = 2, 3  # cycles of an outer step, and how many of these the public code ran
stored = [(folder, key) for folder in FOLDERS for key in expected(folder) if key not in ("input_ids", "call_is_H")]
ROLES = ("pattern", "resid_post", "stack_in", "stack_out")


@lru_cache
def load(folder: str, dtype: torch.dtype = torch.float32) -> LoopedModel:
    return LoopedModel.from_pretrained(PARITY / folder, dtype=dtype)


@lru_cache
def prompts(folder: str) -> Tensor:
    """The stored prompts, each with its puzzle's tokens before it."""
    puzzles, ids = (expected(folder)[name] for name in ("puzzle_identifiers", "input_ids"))
    cfg = load(folder).cfg
    return torch.stack([torch.tensor([*cfg.puzzle_tokens(int(p)), *row]) for p, row in zip(puzzles, ids, strict=True)])


@lru_cache
def ran(folder: str) -> tuple[LoopedModel, Tensor, LoopedCache]:
    """All outer steps in one run."""
    model = load(folder)
    with torch.no_grad():
        return model, *model.run_with_cache(prompts(folder))


def in_role(folder: str, key: str) -> Tensor:
    """What the stacks compute, in the order of the calls that are stored: TRM's are of both roles."""
    _, _, cache = ran(folder)
    role, name = key[0], {"stack_in": "injection", "stack_out": "state_post"}.get(key[2:], key[2:])
    if folder == "hrm-act":
        return cache.stack(f"{role}_blocks.{name}")
    fast, slow = (iter(cache.stack(f"{stack}_blocks.{name}")) for stack in "LH")
    return torch.stack([next(slow if is_h else fast) for is_h in expected(folder)["call_is_H"].tolist()])


def ours(folder: str, key: str) -> Tensor:
    """What our model computes for a stored key."""
    model, _, cache = ran(folder)
    rows = model.cfg.puzzles.rows if model.cfg.puzzles else 0
    if key == "puzzle_identifiers":
        return (cache.run.tokens[:, 0] - model.cfg.d_vocab) // rows
    if key == "input_embeddings":
        return cache["embed"]
    if key.startswith("carry"):
        stack = f"{key[-1]}_blocks"
        each = model.cfg.schedule().n_loops(stack) // STEPS
        return cache.stack(f"{stack}.state_post")[each - 1 :: each]
    if key == "logits":
        states = cache.stack("H_blocks.state_post")[H - 1 :: H]
        with torch.no_grad():
            return torch.stack([model.readout(state, cache.run.tokens)[:, rows:] for state in states])
    if key in ("q_halt_logits", "q_continue_logits"):
        return cache.stack("H_blocks.halt_gate")[H - 1 :: H, :, 0, int(key == "q_continue_logits")]
    assert key[2:] in ROLES, f"{key} is stored, but no test knows it"
    return in_role(folder, key)


@pytest.mark.parametrize(("folder", "key"), stored)
def test_every_stored_number(folder: str, key: str):
    found, wanted = ours(folder, key), expected(folder)[key]
    assert found.shape == wanted.shape
    error = float((found - wanted).abs().max())
    assert error <= 1e-4
    assert error <= 2e-5 * max(1.0, float(wanted.abs().max()))


@every_folder
def test_stopping_after_each_loop_is_reading_out_each_state(folder: str):
    model, tokens = load(folder), prompts(folder)
    with torch.no_grad():
        state = model(tokens, 3, stop_at_loop=2)
        assert torch.equal(model(tokens, 2), model.readout(state, tokens))
        assert torch.equal(model(tokens, 3, initial_state=state, start_at_loop=2), model(tokens, 3))


@every_folder
def test_hooks_that_return_nothing_change_nothing_and_clean_patches_neither(folder: str):
    model, tokens = load(folder, torch.float64), prompts(folder)
    with torch.no_grad():
        plain, cache = model.run_with_cache(tokens, (2, 1), names_filter=lambda _: True)
        assert torch.equal(
            model.run_with_hooks(tokens, (2, 1), fwd_hooks=[(lambda _: True, lambda x, hook: None)]), plain
        )
        same = [(name, lambda x, hook: cache[hook.name].clone()) for name in cache]
        torch.testing.assert_close(model.run_with_hooks(tokens, (2, 1), fwd_hooks=same), plain, rtol=1e-9, atol=1e-9)
        for name in cache:
            edit = [(name, lambda x, hook: x + 0.1 * noise_like(x))]
            changes = not torch.equal(model.run_with_hooks(tokens, (2, 1), fwd_hooks=edit), plain)
            assert changes == ("hook_halt_gate" not in name), name
    assert hook_count(model) == 0


@every_folder
def test_gradients_predict_finite_differences(folder: str):
    model, tokens = load(folder, torch.float64), prompts(folder)

    def score() -> Tensor:
        return (model(tokens, (2, 2)) * noise_like(torch.empty(1, *tokens.shape[1:], model.cfg.d_vocab))).sum()

    model.zero_grad()
    score().backward()
    kinds = {name.replace(".1.", ".0."): (name, weight) for name, weight in model.transformer.named_parameters()}
    for name, weight in kinds.values():
        if name.startswith("halt_gate"):
            assert weight.grad is None  # the logits do not read it
            continue
        if weight.grad is None:
            raise AssertionError(f"{name} has no gradient")
        move = noise_like(weight) / weight.numel() ** 0.5
        with torch.no_grad():
            weight += 1e-6 * move
            above = float(score())
            weight -= 2e-6 * move
            below = float(score())
            weight += 1e-6 * move
        assert (above - below) / 2e-6 == pytest.approx(float((weight.grad * move).sum()), rel=1e-4, abs=1e-6), name
    model.zero_grad()


@every_folder
def test_all_tokens_see_all_but_padding(folder: str):
    model, tokens = load(folder, torch.float64), prompts(folder)
    with torch.no_grad():
        logits, cache = model.run_with_cache(tokens, 2, names_filter=lambda name: name.endswith("pattern"))
        assert all(bool((pattern > 0).all()) for pattern in cache.cache_dict.values())
        short = tokens[:1, :6]
        for left in (True, False):
            filler = torch.zeros(1, tokens.shape[1] - 6, dtype=torch.long)
            padded = torch.cat((filler, short) if left else (short, filler), dim=1)
            mask = torch.zeros_like(tokens)
            mask[1], mask[:1, -6:] = 1, 0
            mask[:1, slice(-6, None) if left else slice(6)] = 1
            found = model(torch.cat((padded, tokens[1:])), 2, attention_mask=mask)
            torch.testing.assert_close(found[:1][mask[:1].bool()], model(short, 2)[0], rtol=1e-9, atol=1e-9)
            torch.testing.assert_close(found[1:], logits[1:], rtol=1e-9, atol=1e-9)


def test_trm_runs_the_same_layers_in_both_roles():
    network = load("trm").transformer
    names = [name for name, _ in network.named_parameters()]
    assert not any(name.startswith("H_blocks") for name in names)
    assert network.H_blocks[1].attn.q is network.L_blocks[1].attn.q
    assert any(name.startswith("H_blocks") for name, _ in load("hrm-act").transformer.named_parameters())


@every_folder
def test_a_saved_copy_is_the_model(folder: str, tmp_path: Any):
    model, tokens = load(folder), prompts(folder)
    model.save_pretrained(tmp_path / "copy")
    copy = LoopedModel.from_pretrained(tmp_path / "copy")
    with torch.no_grad():
        assert copy.cfg == model.cfg
        torch.testing.assert_close(copy(tokens), model(tokens), atol=1e-5, rtol=1e-5)


@every_folder
def test_its_own_check_passes_and_its_parts_are_said(folder: str):
    assert [one for one in check(load(folder), n_loops=2) if not one.passed] == []
    assert dict(describe(load(folder).cfg))["prompts"] == "all tokens see each other"


@every_folder
def test_analyses_read_the_answer_at_its_own_position(folder: str):
    model, tokens = load(folder), prompts(folder)[:1]
    found = logit_lens(model, tokens, positions=None)
    torch.testing.assert_close(found.top_probs[-1], ran(folder)[1][:1].softmax(-1).topk(5).values)
    source = model.run_with_cache(prompts(folder)[1:], 2)[1]
    swept = patch_sweep(
        model, tokens, 2, source=source, metric=lambda x: x[0, 3, 1], site="state", axes=("loop",), stack="H_blocks",
        progress=False,
    )  # fmt: skip
    assert swept.values.shape == (2,)


@every_folder
def test_what_predicts_a_next_token_refuses(folder: str):
    model, tokens = load(folder), prompts(folder)
    message = "needs a model that reads from left to right, but .* sees tokens in both directions"
    for call in (
        lambda: model(tokens, return_type="loss"),
        lambda: model.generate(tokens, 2),
        lambda: observe(model, tokens, measures=[LOSS]),
        lambda: view_prompt(model, tokens[:1]),
    ):
        with pytest.raises(InputError, match=message):
            call()


@pytest.mark.parametrize("tokens", [[1, 2, 3], [11, 1, 12], [12, 13, 1, 2], [11, 14, 2]])
def test_a_prompt_begins_with_one_puzzle(tokens: list[int]):
    """TRM's puzzles have two rows: 11 and 12 are puzzle 0, 13 and 14 puzzle 1."""
    with pytest.raises(InputError, match=r"prompt 0 must begin with the tokens of one puzzle.*, such as \[11, 12\]"):
        load("trm")(torch.tensor([tokens]))


def test_there_are_so_many_puzzles():
    cfg = load("trm").cfg
    assert (cfg.puzzle_tokens(0), cfg.puzzle_tokens(-1)) == ([11, 12], [15, 16])
    with pytest.raises(InputError, match="puzzle 3 is out of range: 3 exist"):
        cfg.puzzle_tokens(3)
    with pytest.raises(InputError, match=r"token id 17 is out of the vocabulary \[0, 17\)"):
        load("trm")(torch.tensor([[11, 12, 17]]))


@pytest.mark.parametrize(
    ("folder", "arch", "message"),
    [
        ("trm", {"mlp_t": True}, "arch.mlp_t=True, which is not implemented"),
        ("hrm-act", {"pos_encodings": "learned"}, "arch.pos_encodings='learned', which is not implemented"),
        ("hrm-act", {"H_layers": 4}, "arch.H_layers=4 and arch.L_layers=2: only equal ones are"),
        ("hrm-act", {"mixture": 3}, "arch.mixture=3, which no hrm model here uses"),
    ],
)
def test_what_is_not_implemented_is_refused_by_name(released: Any, folder: str, arch: dict[str, Any], message: str):
    values = json.loads((PARITY / folder / "config.json").read_text())["arch"]
    refuse(released(folder, {"arch": {**values, **arch}}), message)


def test_a_compiled_models_names_load(released: Any):
    def wrap(weights: dict[str, Tensor]) -> None:
        for name in list(weights):
            weights[f"_orig_mod.{name}"] = weights.pop(name)

    model = LoopedModel.from_pretrained(released("trm", change=wrap))
    with torch.no_grad():
        torch.testing.assert_close(model(prompts("trm")), load("trm")(prompts("trm")), atol=1e-5, rtol=1e-5)
