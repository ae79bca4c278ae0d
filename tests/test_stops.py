"""A run stops at a layer of a loop, and goes on from there: `stop_at` and `start_at`, on every family."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import torch
from analyses import analyses, call
from families import FOLDERS, load
from helpers import PARITY, expected, make, noise_like, parity
from torch import Tensor

from tl_looped import HookSite, InputError, LoopedCache, LoopedModel
from tl_looped.engine.errors import HookNameError

EVERY = sorted(path.name for path in PARITY.iterdir() if path.is_dir())
CHAIN = "a=4; c=a; b=7; d=c; f=b; ? d"
READ = ("hook_embed", "hook_pos_embed", "ln_embed", "prelude.", "ln_prelude")  # what a run makes of its tokens
ADDED: dict[str, Any] = {"n_loops": 3, "n_prelude": 2, "n_coda": 1, "injection": "add", "state_init": "prelude"}


@lru_cache
def ran(folder: str) -> tuple[LoopedModel, dict[str, Any], Tensor, Tensor, LoopedCache]:
    """Model, how it runs, tokens, and logits and cache of a whole run."""
    model = load(folder) if folder in FOLDERS else parity(folder)
    options: dict[str, Any] = {"n_loops": (2, 2) if model.cfg.two_states else min(3, model.cfg.n_loops)}
    options |= {"prefix_length": 2} if model.cfg.prefix_lm else {}
    if model.cfg.puzzles is None:
        tokens = expected(folder)["input_ids"]
    else:
        ids = torch.randint(model.cfg.d_vocab, (2, 6), generator=torch.Generator().manual_seed(1))
        tokens = torch.cat((torch.tensor(model.cfg.puzzle_tokens(1)).expand(2, -1), ids), dim=1)
    with torch.no_grad():
        return model, options, tokens, *model.run_with_cache(tokens, **options)


def at_of(stack: str, layer: int, loop: int | None) -> tuple[Any, ...]:
    """What `stop_at` calls a layer."""
    if stack == "blocks":
        return loop, layer
    return (stack, layer) if loop is None else (stack, loop, layer)


def state_for(cache: LoopedCache, stack: str, loop: int | None) -> dict[str, Tensor]:
    """The state that a run reads besides the stream, where its loop's end reads one."""
    if loop is None or cache.cfg.resumes_in_loop:
        return {}
    if cache.cfg.two_states is None:
        return {"initial_state": cache["state_pre", loop]}
    t = cache.schedule.around(stack, [loop])[0]
    last = cache.schedule.loops_in("L_blocks", [t])[-1]
    z_l = cache["L_blocks.state_pre", loop] if stack == "L_blocks" else cache["L_blocks.state_post", last]
    return {"initial_state": torch.cat((cache["H_blocks.state_pre", t], z_l), dim=-1)}


@torch.no_grad()
@pytest.mark.parametrize("folder", EVERY)
def test_stopping_and_going_on_changes_nothing(folder: str) -> None:
    """At every layer of every loop, to the bit; and either part caches what it runs, and nothing else."""
    model, options, tokens, logits, cache = ran(folder)
    names = list(cache.keys())  # in the order of the run
    for stack, layer, loop in cache.schedule.layer_calls():
        at, here = at_of(stack, layer, loop), HookSite("hook_resid_pre", stack, layer, loop).name
        stream, before = model.run_with_cache(tokens, **options, stop_at=at)
        assert torch.equal(stream, cache[here])
        more = {"start_at": at, "tokens": tokens, **state_for(cache, stack, loop)}
        again, after = model.run_with_cache(stream, **options, **more)
        assert torch.equal(again, logits)
        begun = names[: names.index(here)]
        assert list(before.keys()) == [name for name in begun if layer or name != f"loop.{loop}.hook_condition"]
        rest = set(names) - set(begun)
        injects = stack != "prelude" and any(name.endswith("hook_injection_in") for name in rest)
        again_read = READ if injects and model.cfg.reads_input_in_loops else ()
        anew = {name for name in begun if name.startswith(again_read) or name == f"loop.{loop}.hook_condition"}
        assert set(after.keys()) == rest | anew
        for part in (before, after):
            assert all(torch.equal(value, cache[name]) for name, value in part.items())


@torch.no_grad()
@pytest.mark.parametrize("side", ["left", "right"])
def test_rows_that_are_padded_go_on_alone(side: Any) -> None:
    model = LoopedModel.from_pretrained("looped-hops")
    texts = ["a=4; ? a", CHAIN]
    stream = model(texts, padding_side=side, stop_at=(2, 1))
    runs = model.prepare(stream, start_at=(2, 1), tokens=texts, padding_side=side)
    assert torch.equal(model(runs), model(texts, padding_side=side))
    for row, text in enumerate(texts):
        torch.testing.assert_close(model.execute(model.batch_of(runs, [row])), model(text), atol=2e-5, rtol=0)


@torch.no_grad()
def test_the_middle_of_a_run_runs_alone() -> None:
    """Between two layers, and between a layer and a loop's beginning; negative numbers count from the end."""
    model, tokens = make(**ADDED), torch.arange(6)[None]
    stream = model(tokens, stop_at=("prelude", 1))
    middle = model(stream, start_at=("prelude", 1), tokens=tokens, stop_at=(1, 1))
    assert torch.equal(middle, model(tokens, stop_at=(-2, -1)))
    state = model(middle, start_at=(1, 1), tokens=tokens, stop_at_loop=2)
    assert torch.equal(state, model(tokens, stop_at_loop=2))
    late = model(tokens, initial_state=state, start_at_loop=2, stop_at=("coda", 0))
    assert torch.equal(late, model(tokens, stop_at=("coda", None, 0)))
    assert torch.equal(model(late, start_at=("coda", 0), tokens=tokens), model(tokens))
    assert torch.equal(model(late, start_at=("coda", 0), tokens=tokens, stop_at=("coda", 0)), late)


def test_an_edit_acts_as_in_the_whole_run() -> None:
    """What is injected is made of the tokens again, so a hook on it acts; a stream that is edited is another run's."""
    model, tokens = make(**ADDED), torch.arange(6)[None]
    stream = model(tokens, stop_at=(1, 1)).detach()
    noise = noise_like(stream)
    patched = model.run_with_hooks(tokens, fwd_hooks=[("blocks.1.loop.1.hook_resid_pre", lambda x, hook: x + noise)])
    assert torch.equal(model(stream + noise, start_at=(1, 1), tokens=tokens), patched)
    both: list[Any] = [("loop.2.hook_injection_in", lambda x, hook: x * 2)]
    whole = model.run_with_hooks(tokens, fwd_hooks=both)
    assert torch.equal(model.run_with_hooks(stream, start_at=(1, 1), tokens=tokens, fwd_hooks=both), whole)
    silent: list[Any] = [("prelude.1.hook_resid_post", lambda x, hook: x * 0)]
    no_input = model.run_with_hooks(stream, start_at=(1, 1), tokens=tokens, fwd_hooks=silent)
    cut: list[Any] = [("loop.2.hook_injection_in", lambda x, hook: x * 0)]
    assert torch.equal(no_input, model.run_with_hooks(tokens, fwd_hooks=cut))


def test_gradients_and_losses_are_those_of_the_whole_run() -> None:
    model, tokens = make(**ADDED), torch.arange(6)[None]
    loss, whole = model.run_with_cache(tokens, return_type="loss", incl_bwd=True)
    model.zero_grad()
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    stream = model(tokens, stop_at=(1, 1))
    again, part = model.run_with_cache(stream, start_at=(1, 1), tokens=tokens, return_type="loss", incl_bwd=True)
    assert torch.equal(again, loss)
    for name in ("blocks.1.loop.1.hook_resid_pre_grad", "blocks.0.loop.2.attn.hook_z_grad", "coda.0.hook_mlp_out_grad"):
        torch.testing.assert_close(part[name], whole[name])
    given = stream.clone().requires_grad_()
    model(given, start_at=(1, 1), tokens=tokens, return_type="loss").backward()
    assert given.grad is not None
    torch.testing.assert_close(given.grad, whole["blocks.1.loop.1.hook_resid_pre_grad"])


def test_a_result_says_its_part(tmp_path: Path) -> None:
    model, tokens = make(**ADDED), torch.arange(6)[None]
    stream, cache = model.run_with_cache(tokens, 5, stop_at=(3, 1))
    assert cache.made_by["n_loops"] == 5 and cache.made_by["stop_at"] == "blocks.1.loop.3.hook_resid_pre"
    assert cache.kept_loops == (0, 1, 2, 3)
    assert "loops 0 to 3 of 5, before blocks.1.loop.3" in repr(model.prepare(tokens, 5, stop_at=(3, 1)))
    rest = model.run_with_cache(stream, 5, start_at=(3, 1), tokens=tokens)[1]
    again = LoopedCache.load(rest.save(tmp_path / "part.safetensors"), model)
    assert again.made_by["start_at"] == "blocks.1.loop.3.hook_resid_pre" and again.kept_loops == (3, 4)
    assert again.run.stream is not None and torch.equal(again.run.stream, stream)


def hooked(model: LoopedModel, name: str, *args: Any, **options: Any) -> Any:
    return model.run_with_hooks(*args, **options, fwd_hooks=[(name, lambda x, hook: x)])


def gated() -> LoopedModel:
    return make(n_loops=2, loop_update="residual")


STREAM = torch.zeros(1, 6, 16)
TOKENS = torch.arange(6)[None]
UNREACHED = "which this run does not reach: it goes from"
WRONG: dict[str, tuple[Any, str]] = {
    "a hook where it stops": (
        lambda m: hooked(m, "blocks.1.loop.1.hook_resid_pre", TOKENS, stop_at=(1, 1)),
        rf"'blocks.1.loop.1.hook_resid_pre', {UNREACHED} loop 0 to blocks.1.loop.1.hook_resid_pre",
    ),
    "a hook behind it": (lambda m: hooked(m, "blocks.1.loop.2.attn.hook_z", TOKENS, stop_at=(1, 1)), UNREACHED),
    "a hook on the head": (lambda m: hooked(m, "ln_final.hook_scale", TOKENS, stop_at=("coda", 0)), UNREACHED),
    "a hook before it": (
        lambda m: hooked(m, "blocks.0.loop.1.attn.hook_z", STREAM, start_at=(1, 1), tokens=TOKENS),
        rf"'blocks.0.loop.1.attn.hook_z', {UNREACHED} blocks.1.loop.1.hook_resid_pre to the logits",
    ),
    "a hook on what is injected no more": (
        lambda m: hooked(m, "prelude.0.hook_attn_out", STREAM, start_at=(2, 1), tokens=TOKENS),
        UNREACHED,
    ),
    "a site to cache": (
        lambda m: m.run_with_cache(TOKENS, stop_at=(1, 1), names_filter="blocks.1.loop.1.hook_resid_mid"),
        "nothing to cache at 'blocks.1.loop.1.hook_resid_mid': it goes from loop 0 to blocks.1.loop.1",
    ),
    "a layer alone": (
        lambda m: m(TOKENS, stop_at=1),
        r"must be \(loop, layer\) or \('prelude', layer\) or \('coda', layer\), got 1: the model runs prelude 2",
    ),
    "a stack that there is not": (lambda m: m(TOKENS, stop_at=("L_blocks", 1, 1)), r"must be \(loop, layer\)"),
    "a core without its loop": (lambda m: m(TOKENS, stop_at=("blocks", 1)), r"must be \(loop, layer\)"),
    "a prelude in a loop": (lambda m: m(TOKENS, stop_at=("prelude", 0, 1)), r"must be \(loop, layer\)"),
    "a loop too many": (lambda m: m(TOKENS, stop_at=(3, 0)), "the loop of stop_at 3 is out of range: 3 exist"),
    "a layer too many": (lambda m: m(TOKENS, stop_at=(0, 2)), "the layer of stop_at 2 is out of range: 2 exist"),
    "two stops": (lambda m: m(TOKENS, stop_at=(1, 1), stop_at_loop=2), "stop_at_loop=2 and stop_at=.* both say where"),
    "two starts": (
        lambda m: m(STREAM, start_at=(1, 1), start_at_loop=1, tokens=TOKENS),
        "start_at_loop=1 and start_at=.* both say where the run starts: leave one out",
    ),
    "the other way round": (
        lambda m: m(STREAM, start_at=(2, 0), stop_at=(1, 1), tokens=TOKENS),
        "stop at blocks.1.loop.1.hook_resid_pre, which comes before blocks.0.loop.2.hook_resid_pre, where it starts",
    ),
    "no tokens": (lambda m: m(STREAM, start_at=(1, 1)), r"model\(stream, start_at=\(1, 1\), tokens=prompts\)"),
    "tokens in the stream's place": (lambda m: m(TOKENS, start_at=(1, 1), tokens=TOKENS), r"model\(stream, start_at="),
    "tokens alone": (lambda m: m(TOKENS, tokens=TOKENS), "tokens are the prompts of a run with start_at"),
    "prepared tokens": (lambda m: m(STREAM, start_at=(1, 1), tokens=m.prepare(TOKENS)), r"model\(stream, start_at="),
    "another length": (
        lambda m: m(STREAM[:, 1:], start_at=(1, 1), tokens=TOKENS),
        r"must be torch.float32 of shape \(1, 6, 16\) = \[batch, pos, d_model\], got .* \(1, 5, 16\)",
    ),
    "another format": (lambda m: m(STREAM.double(), start_at=(1, 1), tokens=TOKENS), "got torch.float64"),
    "a seed": (lambda m: m(STREAM, start_at=(1, 1), tokens=TOKENS, seed=1), "no state is drawn: leave out seed"),
    "a state that is not read": (
        lambda m: m(STREAM, start_at=(1, 1), tokens=TOKENS, initial_state=STREAM),
        "no state is read there: leave out initial_state",
    ),
    "a loss": (lambda m: m(TOKENS, stop_at=(1, 1), return_type="loss"), "no loss: leave out stop_at, or return_type="),
    "the last logits": (lambda m: m.last_logits(m.prepare(TOKENS, stop_at=(1, 1))), "leave out start_at and stop_at"),
    "a state that is read": (
        lambda m: gated()(STREAM, start_at=(1, 1), tokens=TOKENS),
        "in a loop whose end reads the state that entered the loop: pass that as initial_state",
    ),
    "both states": (
        lambda m: parity("hrm-text")(STREAM, start_at=("L_blocks", 1, 1), tokens=TOKENS),
        r"whose end reads both states, \[z_H ; z_L\], as it began: pass that as initial_state",
    ),
    "which stack": (
        lambda m: parity("hrm-text")(TOKENS, stop_at=(1, 1)),
        r"stop_at must be \('L_blocks', loop, layer\) or \('H_blocks', loop, layer\), got \(1, 1\)",
    ),
}


@pytest.mark.usefixtures("as_a_user")
@pytest.mark.parametrize("name", WRONG)
def test_what_can_not_be_is_told_before_the_run(name: str) -> None:
    wrong, message = WRONG[name]
    with pytest.raises(InputError, match=message):
        wrong(make(**ADDED))


def test_a_hook_that_is_not_reached_is_an_error_of_names() -> None:
    with pytest.raises(HookNameError, match=UNREACHED):
        hooked(make(**ADDED), "loop.1.hook_state_post", TOKENS, stop_at=(1, 1))


OTHERS = {"directions", "record", "steering_sweep", "mean_source", "paper_claims"}
NOT_WHOLE = sorted(set(analyses()) - OTHERS)


@pytest.mark.parametrize("name", NOT_WHOLE)
def test_analyses_of_whole_runs_refuse_a_part(name: str) -> None:
    """A run that begins in the middle of loop 0 is not one that begins with it."""
    model = make(**ADDED | {"n_loops": 64})
    for runs in (
        model.prepare(STREAM, start_at=(0, 1), tokens=TOKENS),
        model.prepare(TOKENS, stop_at=(63, 1)),
    ):
        with pytest.raises(InputError, match=rf"{'start_at and' if runs.start_at else 'and stop_at'}\b"):
            call(name, model, runs, None)
