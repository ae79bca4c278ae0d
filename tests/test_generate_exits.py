"""Tokens that stop before their last loop, against a slow decoder that runs one position at a time; and watchers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from helpers import FAMILIES, TINY, WORDS, hook_count, make, parity, tiny, tokens_for, waits, word_tokenizer
from plain import Plain, rotate, weights_of

from tl_looped import InputError, LoopedModel
from tl_looped.generation import Generated, LoopEnd
from tl_looped.lens.exits import EntropyRule, KLRule

N_LOOPS = 4


@dataclass
class ExitAt:
    """Every row has its own loop to stop at, for each new token in turn; `watch` says which token it is."""

    loops: Sequence[Sequence[int]]  # [new][row]
    n_prompt: int
    asked: list[int] | None = None
    _new: int = 0

    def watch(self, end: LoopEnd, position: int) -> None:
        self._new = position - self.n_prompt + 1

    def begin(self, model: LoopedModel, n_loops: int) -> Callable[[LoopEnd], torch.Tensor]:
        def judge(end: LoopEnd) -> torch.Tensor:
            if self.asked is not None:
                self.asked.append(end.loop)
            return torch.tensor(self.loops[self._new]) == end.loop

        return judge


class OneByOne(Plain):
    """The model one position at a time, each with its own number of loops; keys and values in lists, by call."""

    def __init__(self, model: LoopedModel):
        super().__init__(model.cfg, weights_of(model))
        self.kept: dict[str, list[tuple[torch.Tensor, torch.Tensor]]] = {}

    def attention(self, x: torch.Tensor, where: str, at: str) -> torch.Tensor:
        cfg, heads = self.cfg, {}
        n_kv = cfg.n_key_value_heads or cfg.n_heads
        for part in ("q", "k", "v"):
            whole = self.linear(x, f"{where}.attn.{part}")
            if cfg.qk_norm and part != "v":
                whole = self.norm(whole, f"{where}.attn.{part}_norm.weight")
            split = whole.split(cfg.d_head, dim=-1)
            heads[part] = [head if part == "v" else rotate(cfg, head, self.positions) for head in split]
        kept = self.kept.setdefault(at, [])
        kept[int(self.positions) :] = [(torch.stack(heads["k"]), torch.stack(heads["v"]))]
        out = []
        for h, q in enumerate(heads["q"]):
            g = h // (cfg.n_heads // n_kv)
            scores = torch.stack([(q * k[g]).sum() / cfg.d_head**0.5 for k, _ in kept])
            out.append(sum(share * v[g] for share, (_, v) in zip(scores.softmax(0), kept, strict=True)))
        return torch.cat(out, dim=-1) @ self.w[f"{where}.attn.o.weight"].T

    def enter(self, x: torch.Tensor, e: torch.Tensor) -> torch.Tensor:
        if self.cfg.injection == "none":
            return x
        if self.cfg.injection == "add":
            return x + e
        return torch.cat((x, e), dim=-1) @ self.w["injection.weight"].T

    def position(self, token: int, position: int, last_loop: int, state: torch.Tensor | None) -> torch.Tensor:
        """Log probabilities after one more token, which stops after `last_loop`; its state is left in `self.state`."""
        cfg, self.positions = self.cfg, torch.tensor([position])
        x = self.w["embed.weight"][token].view(1, 1, -1) * cfg.embed_scale
        for layer in range(cfg.n_prelude):
            x = self.layer(x, f"prelude.{layer}", f"prelude.{layer}")
        e, x = x, x if state is None else state.view(1, 1, -1)
        for t in range(last_loop + 1):
            x = self.enter(x, e)
            for layer in range(cfg.n_core):
                x = self.layer(x, f"blocks.{layer}", f"blocks.{layer}.loop.{t}")
            if cfg.loop_norm == "each":
                x = self.norm(x, "ln_final.weight")
        for t in range(last_loop + 1, N_LOOPS):
            for layer in range(cfg.n_core):
                kept = self.kept.setdefault(f"blocks.{layer}.loop.{t}", [])
                kept[position:] = [self.kept[f"blocks.{layer}.loop.{last_loop}"][position]]
        self.state = x
        return self.read(x)

    def read(self, x: torch.Tensor) -> torch.Tensor:
        """What the model says if the position stops with state x."""
        if self.cfg.loop_norm == "last":
            x = self.norm(x, "ln_final.weight")
        for layer in range(self.cfg.n_coda):
            x = self.layer(x, f"coda.{layer}", f"coda.{layer}")
        if self.cfg.final_norm:
            x = self.norm(x, "ln_final.weight")
        head = "embed.weight" if self.cfg.tie_embeddings else "unembed.weight"
        return (x @ self.w[head].T).flatten().log_softmax(-1)


def slow_text(
    model: LoopedModel, prompt: list[int], last_loops: Sequence[int], policy: str = "fresh"
) -> tuple[list[int], list[float]]:
    """The most probable tokens and their log probabilities, where the i-th stops after the i-th of these loops."""
    slow, tokens, found = OneByOne(model), list(prompt), []
    blank = torch.zeros(1, len(prompt) + len(last_loops), dtype=torch.long)
    drawn = model.batch(blank, N_LOOPS, attention_mask=torch.ones_like(blank)).state
    for position in range(len(prompt) + len(last_loops) - 1):
        new = position - len(prompt) + 1
        state = None if drawn is None else drawn[0, position]
        if new > 0 and policy != "fresh":
            state = slow.state if policy == "carry" else torch.zeros_like(state)
        log_probs = slow.position(tokens[position], position, N_LOOPS - 1 if new < 0 else last_loops[new], state)
        if new >= 0:
            tokens.append(int(log_probs.argmax()))
            found.append(float(log_probs.max()))
    return tokens[len(prompt) :], found


def generated(model: LoopedModel, tokens: Any, n_new: int, **options: Any) -> Generated:
    options = {"do_sample": False, "stop_at_eos": False, "verbose": False, **options}
    return model.generate(tokens, n_new, N_LOOPS, return_type="result", **options)


@pytest.fixture(params=TINY)
def model(request: pytest.FixtureRequest) -> LoopedModel:
    return tiny(request.param, torch.float64)


EXITS = [[2, 0, 3], [0, 3, 1], [3, 1, 1], [1, 2, 0], [3, 0, 2]]  # [new][row]


@pytest.mark.parametrize("policy", ["fresh", "carry"])
def test_tokens_that_stop_early(model, policy):
    """Each row by itself, at another loop for each token: later loops find the keys and values of the last one run."""
    if policy == "carry" and model.cfg.state_init == "prelude":
        pytest.skip("only states that are drawn can be carried")
    tokens = tokens_for(model, batch=3, pos=3)
    rule = ExitAt(EXITS, n_prompt=3)
    found = generated(model, tokens, 5, exit_rule=rule, watch=rule.watch, new_states=policy)
    assert found.loops.T.tolist() == [[loop + 1 for loop in step] for step in EXITS]
    for row in range(3):
        wanted, log_probs = slow_text(model, tokens[row].tolist(), [step[row] for step in EXITS], policy)
        assert found.new_tokens[row].tolist() == wanted
        assert found.log_probs[row].tolist() == pytest.approx(log_probs, abs=1e-9)


@pytest.mark.parametrize("family", FAMILIES)
def test_tokens_that_stop_early_in_the_parity_models(family):
    model = parity(family)
    tokens = tokens_for(model, batch=1, pos=2)
    rule = ExitAt([[1], [3], [0]], n_prompt=2)
    found = generated(model, tokens, 3, exit_rule=rule, watch=rule.watch)
    wanted, log_probs = slow_text(model, tokens[0].tolist(), [1, 3, 0])
    assert found.new_tokens[0].tolist() == wanted
    assert found.log_probs[0].tolist() == pytest.approx(log_probs, abs=5e-4)


def test_rows_of_a_padded_batch_stop_as_they_do_alone():
    model = make(torch.float64, word_tokenizer(), d_vocab=len(WORDS), **TINY["huginn"])
    texts = ["a = b ; c", "a", "d = a"]
    rule = ExitAt(EXITS, n_prompt=5)
    found = generated(model, texts, 5, exit_rule=rule, watch=rule.watch)
    for row, text in enumerate(texts):
        wanted, log_probs = slow_text(model, model.to_tokens(text)[0].tolist(), [step[row] for step in EXITS])
        assert found.new_tokens[row].tolist() == wanted
        assert found.log_probs[row].tolist() == pytest.approx(log_probs, abs=1e-9)


def test_a_rule_that_stops_nothing_changes_nothing(model):
    tokens = tokens_for(model)
    asked: list[int] = []
    rule = ExitAt([[99, 99]], n_prompt=0, asked=asked)
    found, wanted = generated(model, tokens, 4, exit_rule=rule), generated(model, tokens, 4)
    assert torch.equal(found.tokens, wanted.tokens)
    torch.testing.assert_close(found.log_probs, wanted.log_probs, rtol=1e-10, atol=1e-10)
    assert found.loops.eq(N_LOOPS).all()
    assert asked == 4 * [0, 1, 2]  # after the last loop there is nothing to decide


def test_loops_end_when_every_row_has_stopped():
    model = tiny("llama", torch.float64)
    tokens, seen = tokens_for(model, pos=3), []
    rule = ExitAt([[2, 1]] * 3, n_prompt=3)
    with model.hooks(fwd_hooks=[("hook_state_post", lambda x, hook: seen.append((hook.first_position, hook.loop)))]):
        generated(model, tokens, 3, exit_rule=rule)
    assert seen == [(0, t) for t in range(N_LOOPS)] + [(position, t) for position in (2, 3, 4) for t in range(3)]


def test_a_row_that_has_ended_does_not_keep_the_others_looping():
    model = tiny("llama", torch.float64)
    tokens = tokens_for(model, pos=3)
    asked: list[int] = []
    rule = ExitAt([[99, 0]] * 6, n_prompt=3, asked=asked)
    whole = generated(model, tokens, 6, exit_rule=rule)
    eos = int(whole.new_tokens[0, 0])
    assert eos not in whole.new_tokens[1].tolist()
    asked.clear()
    found = generated(model, tokens, 6, exit_rule=rule, stop_at_eos=True, eos_token_id=eos)
    assert found.loops.tolist() == [[N_LOOPS, 0, 0, 0, 0, 0], [1] * 6]
    assert asked == [0, 1, 2] + 5 * [0]
    assert torch.equal(found.new_tokens[1], whole.new_tokens[1])


# Loop ends.


def test_a_loop_end_says_what_the_model_would_say(model):
    """And asking changes nothing, to the bit."""
    tokens, prompt = tokens_for(model, pos=3), 3
    ends: list[tuple[int, int, torch.Tensor]] = []
    states: list[tuple[torch.Tensor, torch.Tensor]] = []

    def watch(end: LoopEnd, position: int) -> None:
        ends.append((end.loop, position, end.log_probs))
        states.append((end.state_before, end.state))

    found = generated(model, tokens, 3, watch=watch)
    silent = generated(model, tokens, 3, watch=lambda end, position: None)
    assert torch.equal(found.log_probs, silent.log_probs)
    torch.testing.assert_close(found.log_probs, generated(model, tokens, 3).log_probs, rtol=1e-10, atol=1e-10)
    assert [end[:2] for end in ends] == [(t, prompt - 1 + i) for i in range(3) for t in range(N_LOOPS)]
    for i in range(3):
        assert torch.equal(ends[i * N_LOOPS + N_LOOPS - 1][2].amax(-1), found.log_probs[:, i])
        for t in range(1, N_LOOPS):
            assert torch.equal(states[i * N_LOOPS + t - 1][1], states[i * N_LOOPS + t][0])
    for t in range(N_LOOPS):
        for row in range(2):
            slow = OneByOne(model)
            drawn = model.batch(tokens, N_LOOPS).state
            for position in range(3):
                last = N_LOOPS - 1 if position < 2 else t
                state = None if drawn is None else drawn[row, position]
                wanted = slow.position(int(tokens[row, position]), position, last, state)
            torch.testing.assert_close(ends[t][2][row], wanted, rtol=1e-9, atol=1e-9)


def test_a_loop_end_has_the_gate():
    model = tiny("ouro", torch.float64)
    seen, gates = [], []

    def watch(end: LoopEnd, position: int) -> None:
        gates.append(end.gate_logit)

    with model.hooks(fwd_hooks=[("hook_exit_gate", lambda x, hook: seen.append(x[:, -1]))]):
        generated(model, tokens_for(model), 2, watch=watch)
    torch.testing.assert_close(torch.stack(gates), torch.stack(seen[N_LOOPS:]))  # the first are the prompt's
    with pytest.raises(InputError, match="this model has no exit gate"):
        generated(tiny("llama"), tokens_for(model), 1, watch=watch)


def test_a_rule_may_read_what_the_model_would_say(model):
    """Stop where the top token is as probable as asked, in a rule written here: the read-outs of the slow decoder."""

    class Sure:
        def begin(self, model: LoopedModel, n_loops: int) -> Callable[[LoopEnd], torch.Tensor]:
            return lambda end: end.log_probs.amax(-1) > -1.6

    tokens = tokens_for(model, batch=2, pos=3)
    found = generated(model, tokens, 4, exit_rule=Sure())
    for row in range(2):
        last_loops = [loops - 1 for loops in found.loops[row].tolist()]
        wanted, log_probs = slow_text(model, tokens[row].tolist(), last_loops)
        assert found.new_tokens[row].tolist() == wanted
        assert found.log_probs[row].tolist() == pytest.approx(log_probs, abs=1e-9)
        for last, log_prob in zip(last_loops, log_probs, strict=True):
            assert last == N_LOOPS - 1 or log_prob > -1.6


def test_a_loop_end_that_is_over_is_not_read():
    model = tiny("huginn")
    ends: list[LoopEnd] = []
    generated(model, tokens_for(model), 2, watch=lambda end, position: ends.append(end))
    with pytest.raises(InputError, match=r"the end of loop 0 at position 4 can't be read any more"):
        _ = ends[0].log_probs


def test_a_watcher_may_run_the_model():
    """Its runs begin at position 0, and don't disturb the generation."""
    model = tiny("llama", torch.float64)
    tokens, seen = tokens_for(model), []

    def watch(end: LoopEnd, position: int) -> None:
        hooks = [("hook_embed", lambda x, hook: seen.append(hook.first_position))]
        model.run_with_hooks(tokens, fwd_hooks=hooks)
        model.generate(tokens, 1, stop_at_eos=False, verbose=False)

    found = generated(model, tokens, 2, watch=watch)
    assert set(seen) == {0}
    assert torch.equal(found.tokens, generated(model, tokens, 2).tokens)


def test_an_error_of_a_watcher_leaves_nothing_behind():
    model = tiny("huginn", torch.float64)
    tokens = tokens_for(model)
    broken = [True]

    def watch(end: LoopEnd, position: int) -> None:
        if broken[0] and end.loop == 2:
            raise KeyboardInterrupt
        _ = end.log_probs

    stream = model.generate_stream(tokens, 3, N_LOOPS, stop_at_eos=False, watch=watch)
    with pytest.raises(KeyboardInterrupt):
        next(stream)
    assert hook_count(model) == 0
    assert model.hook_dict.progress.first_position == 0
    assert torch.is_grad_enabled()
    broken[0] = False
    wanted = model.generate(tokens, 3, N_LOOPS, stop_at_eos=False, verbose=False)
    assert torch.equal(torch.stack([step.tokens for step in stream], dim=1), wanted[:, -3:])


# What a rule must be.


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (torch.tensor([True]), r"gave torch.bool of shape \(1,\): it must say for each of 2 rows"),
        (torch.tensor([0.5, 1.0]), r"gave torch.float32 of shape \(2,\)"),
        (True, r"exit_rule .*Answers.* gave bool"),
    ],
)
def test_a_judge_answers_for_every_row(answer, message, as_a_user):
    class Answers:
        def begin(self, model: LoopedModel, n_loops: int) -> Callable[[LoopEnd], Any]:
            return lambda end: answer

    model = tiny("ouro")
    with pytest.raises(InputError, match=message):
        generated(model, tokens_for(model), 1, exit_rule=Answers())


def test_a_rule_that_the_model_cannot_have_is_an_error_before_the_run():
    class Never:
        def begin(self, model: LoopedModel, n_loops: int) -> Callable[[LoopEnd], torch.Tensor]:
            raise InputError(f"not for {n_loops} loops")

    model, ran = tiny("ouro"), []
    hooks = [("hook_embed", lambda x, hook: ran.append(hook.name))]
    with model.hooks(fwd_hooks=hooks), pytest.raises(InputError, match="not for 4 loops"):
        generated(model, tokens_for(model), 1, exit_rule=Never())
    assert ran == []


@pytest.mark.parametrize("rule", [0.5, ExitAt, object()])
def test_what_is_no_rule_is_an_error(rule, as_a_user):
    model = tiny("ouro")
    with pytest.raises(InputError, match=r"exit_rule must have a method begin\(model, n_loops\)"):
        generated(model, tokens_for(model), 1, exit_rule=rule)


@pytest.mark.parametrize(("rule", "each"), [(None, 1), (EntropyRule(1e-9), N_LOOPS), (KLRule(1e-9), N_LOOPS)])
@pytest.mark.parametrize("tokenizer", [None, word_tokenizer()])
def test_the_cpu_waits_once_for_a_token_and_once_for_a_rule_in_a_loop(rule: Any, each: int, tokenizer: Any) -> None:
    """With a rule once after every loop but the last, which it does not judge: N_LOOPS - 1, and once for the token."""
    model = make(tokenizer=tokenizer, d_vocab=len(WORDS))
    tokens, counts = tokens_for(model, batch=3), []
    for new in (2, 6):
        with waits() as seen:
            how = {"top_k": 3, "top_p": 0.9, "temperature": 1.5, "exit_rule": rule, "stop_at_eos": False}
            for _ in model.generate_stream(tokens, new, N_LOOPS, **how):
                pass
        counts.append(len(seen))
    assert counts[1] - counts[0] == 4 * each
