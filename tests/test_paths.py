"""path_patch against a slow transformer of its own (tests/plain.py), and against closed forms."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from helpers import hook_count, make, noise_like
from patching_helpers import CASES, both_clean, case, direction, everywhere, prompts, run_clean
from plain import Plain, Tape, weights_of
from torch import Tensor

from tl_looped import LoopedModel
from tl_looped.engine.errors import InputError
from tl_looped.patching import Receiver, Sender, patch_sweep, path_patch

LOOPS, LENGTH = 3, 4
EXACT = {"rtol": 1e-9, "atol": 1e-9}
INPUTS = {
    "q": ["attn.hook_q"],
    "k": ["attn.hook_k"],
    "v": ["attn.hook_v"],
    "mlp": ["mlp.hook_pre", "mlp.hook_pre_linear"],
}


def paths(model: LoopedModel, sender: Sender, receivers: list[Receiver], metric: Any = None, **options: Any) -> Tensor:
    _, corrupted = prompts(model, pos=LENGTH)
    options = {"reduce": "none", "n_loops": LOOPS, **options}
    cache, _ = both_clean(model, LENGTH, options["n_loops"])
    return path_patch(
        model,
        corrupted,
        source=cache,
        metric=metric or everywhere(model),
        sender=sender,
        receivers=receivers,
        **options,
    ).values


class Slow:
    """Path patching in the slow transformer: every activation passes through one function of its name."""

    def __init__(self, model: LoopedModel):
        self.model = model
        clean, self.corrupted = prompts(model, pos=LENGTH)
        self.clean = self.record(clean, {})
        self.frozen = self.record(self.corrupted, {})

    @torch.no_grad()
    def run(self, tokens: Tensor, edits: dict[str, Tensor], tape: Tape) -> Tensor:
        def see(name: str, value: Tensor) -> Tensor:
            return tape(name, edits.get(name, value))

        state = self.model.batch(tokens, LOOPS).state
        return Plain(self.model.cfg, weights_of(self.model), see).run(tokens, LOOPS, state)

    def record(self, tokens: Tensor, edits: dict[str, Tensor]) -> dict[str, Tensor]:
        tape = Tape()
        tape.values["logits"] = self.run(tokens, edits, tape)
        return tape.values

    def path(self, sender: Sender, receiver: Receiver) -> Tensor:
        held = {name: x for name, x in self.frozen.items() if name.endswith(("attn.hook_z", "hook_mlp_out"))}
        name = f"blocks.{sender.layer}.loop.{sender.loop}.{'hook_mlp_out' if sender.kind == 'mlp' else 'attn.hook_z'}"
        sent = held[name].clone()
        where = (slice(None), slice(None), slice(None) if sender.head is None else sender.head)
        sent[where] = self.clean[name][where]
        direct = self.record(self.corrupted, {**held, name: sent})
        if receiver.kind == "readout":
            return direct["logits"]
        edits = {}
        for part in INPUTS[receiver.kind]:
            name = f"blocks.{receiver.layer}.loop.{receiver.loop}.{part}"
            where = (slice(None), slice(None), slice(None) if receiver.head is None else receiver.head)
            edits[name] = self.frozen[name].clone()
            edits[name][where] = direct[name][where]
        return self.record(self.corrupted, edits)["logits"]


@pytest.mark.parametrize("name", CASES)
def test_a_path_is_what_a_slow_transformer_gives(as_a_user: None, name: str) -> None:
    model = case(name, torch.float64)
    slow = Slow(model)
    last = model.cfg.n_core - 1
    kv = model.cfg.kv_heads - 1
    receivers = [
        Receiver("q", 1, last, 0),
        Receiver("k", LOOPS - 1, 0, kv),
        Receiver("v", 1, 1),
        Receiver("mlp", 2, last),
        Receiver("readout"),
    ]
    for sender in (Sender(0, 1, "head", 2), Sender(1, 0, "attn"), Sender(0, last, "mlp")):
        ours = paths(model, sender, receivers)
        for value, receiver in zip(ours, receivers, strict=True):
            expected = everywhere(model)(slow.path(sender, receiver))
            torch.testing.assert_close(value, expected, **EXACT, msg=lambda text: f"{sender} {receiver}: {text}")
        unpatched = everywhere(model)(slow.frozen["logits"])
        assert bool(((ours - unpatched).abs().amax(-1) > 1e-6).all())
    assert hook_count(model) == 0


def test_a_head_reaches_the_mlp_of_its_own_layer() -> None:
    model = case("huginn", torch.float64)
    sender, receiver = Sender(1, 1, "head", 0), Receiver("mlp", 1, 1)
    expected = everywhere(model)(Slow(model).path(sender, receiver))
    torch.testing.assert_close(paths(model, sender, [receiver])[0], expected, **EXACT)


# Closed forms.


def linear_readout(**changes: Any) -> LoopedModel:
    """Pre-norm layers, no norm between loops nor before the head: what is written is read by the head as it is."""
    return make(torch.float64, final_norm=False, **changes)


def every_sender(model: LoopedModel) -> list[Sender]:
    places = list(itertools.product(range(LOOPS), range(model.cfg.n_core)))
    heads = [Sender(t, layer, "head", head) for t, layer in places for head in range(model.cfg.n_heads)]
    return heads + [Sender(t, layer, "mlp") for t, layer in places]


def written(model: LoopedModel, sender: Sender) -> Tensor:
    """Clean minus corrupted of what a sender writes into the stream, [batch, pos, d_model]."""
    clean, corrupted = (
        cache["mlp_out", sender.layer, sender.loop]
        if sender.kind == "mlp"
        else cache["result", sender.layer, sender.loop].sum(2)
        if sender.head is None
        else cache["result", sender.layer, sender.loop][:, :, sender.head]
        for cache in both_clean(model, LENGTH, LOOPS)
    )
    return clean - corrupted


def all_logits(logits: Tensor) -> Tensor:
    return logits.pow(2).sum((1, 2))


@pytest.mark.parametrize("sender", [Sender(0, 0, "head", 1), Sender(1, 1, "attn"), Sender(2, 0, "mlp")])
def test_the_path_to_the_readout_adds_what_the_sender_wrote(sender: Sender) -> None:
    model = linear_readout()
    corrupted = model(prompts(model, pos=LENGTH)[1], LOOPS).detach()
    expected = all_logits(corrupted + written(model, sender) @ model.W_U)
    torch.testing.assert_close(paths(model, sender, [Receiver("readout")], all_logits)[0], expected.detach(), **EXACT)


@pytest.mark.parametrize("sender", [Sender(0, 1, "head", 3), Sender(1, 0, "mlp"), Sender(2, 1, "attn")])
def test_a_path_across_loops_passes_the_injection_at_the_start_of_each(sender: Sender) -> None:
    model = linear_readout(n_prelude=1, injection="concat_linear")
    through = model.transformer.injection.weight[:, : model.cfg.d_model].T.detach()
    passed = written(model, sender) @ torch.linalg.matrix_power(through, LOOPS - 1 - sender.loop)
    corrupted = model(prompts(model, pos=LENGTH)[1], LOOPS).detach()
    expected = all_logits(corrupted + passed @ model.W_U).detach()
    torch.testing.assert_close(paths(model, sender, [Receiver("readout")], all_logits)[0], expected, **EXACT)


@pytest.mark.parametrize("changes", [{}, {"norm_placement": "output_sandwich"}])
def test_the_direct_paths_of_all_senders_and_the_embedding_add_up_to_the_whole_difference(
    as_a_user: None, changes: Any
) -> None:
    """Logits are the embedding and all that was written, times the unembedding; so their changes add up."""
    model = linear_readout(**changes)
    clean, corrupted = prompts(model, pos=LENGTH)
    metric = direction(model)
    with torch.no_grad():
        low, high = metric(model(corrupted, LOOPS)), metric(model(clean, LOOPS))
        total = metric((model.W_E[clean] - model.W_E[corrupted]) @ model.W_U)
    senders = every_sender(model)
    if changes:  # a norm after attention mixes the heads, so only all of them together add up
        senders = [Sender(s.loop, s.layer, "mlp" if s.kind == "mlp" else "attn") for s in senders if not s.head]
    for sender in senders:
        total += paths(model, sender, [Receiver("readout")], metric)[0] - low
    torch.testing.assert_close(low + total, high, **EXACT)


@pytest.mark.parametrize("kind", ["q", "k", "v", "mlp"])
def test_the_path_to_a_receiver_is_its_input_at_the_corrupted_stream_plus_what_was_written(kind: Any) -> None:
    model = make(torch.float64, n_key_value_heads=2, n_coda=1)
    _, tokens = prompts(model, pos=LENGTH)
    corrupted, sender, receiver = run_clean(model, tokens, LOOPS), Sender(0, 1, "head", 2), Receiver(kind, 2, 1)
    block, read = model.transformer.blocks[1], "resid_mid" if kind == "mlp" else "resid_pre"
    stream = corrupted[read, 1, 2] + written(model, sender)
    edits: dict[str, Tensor] = {}
    with torch.no_grad():
        if kind == "mlp":
            edits["mlp.hook_pre"], edits["mlp.hook_pre_linear"] = (
                f(block.ln2(stream, 2)) for f in (block.mlp.gate, block.mlp.up)
            )
        else:
            edits[f"attn.hook_{kind}"] = getattr(block.attn, kind)(block.ln1(stream, 2)).unflatten(-1, (-1, 4))
        hooks = [(f"blocks.1.loop.2.{name}", lambda x, hook, v=value: v) for name, value in edits.items()]
        expected = everywhere(model)(model.run_with_hooks(tokens, LOOPS, fwd_hooks=hooks))
    torch.testing.assert_close(paths(model, sender, [receiver])[0], expected, **EXACT)
    if kind != "mlp":
        one = paths(model, sender, [Receiver(kind, 2, 1, 1)])[0]
        assert not torch.allclose(one, expected)


@pytest.mark.parametrize("name", ["ouro", "ouro-gqa", "bare"])
def test_the_last_mlp_has_no_path_but_that_to_the_readout(name: str) -> None:
    """So its direct path is all that patching it does; with no coda behind it."""
    model = case(name, torch.float64)
    clean, corrupted = prompts(model, pos=LENGTH)
    last = model.cfg.n_core - 1
    cells = patch_sweep(
        model,
        corrupted,
        source=run_clean(model, clean, LOOPS),
        metric=everywhere(model),
        site="mlp_out",
        axes=("loop", "layer"),
        reduce="none",
        n_loops=LOOPS,
        progress=False,
    )
    direct = paths(model, Sender(LOOPS - 1, last, "mlp"), [Receiver("readout")])[0]
    torch.testing.assert_close(direct, cells.values[-1, last], **EXACT)
    assert not torch.allclose(paths(model, Sender(0, last, "mlp"), [Receiver("readout")])[0], cells.values[0, last])


# What it is called with.


def test_each_receiver_is_measured_alone_in_the_order_given() -> None:
    model, sender = case("retrofit-llama", torch.float64), Sender(0, 0, "mlp")
    receivers = [Receiver("readout"), Receiver("v", 2, 0, 0), Receiver("q", 1, 1), Receiver("mlp", 0, 1)]
    together = paths(model, sender, receivers)
    for value, receiver in zip(together, receivers, strict=True):
        assert torch.equal(value, paths(model, sender, [receiver])[0])
    assert torch.equal(paths(model, sender, receivers[::-1]), together.flip(0))


def test_negative_indices_count_from_the_end_and_all_heads_are_attention() -> None:
    model = case("ouro-gqa", torch.float64)
    ours = paths(model, Sender(-2, -1, "head", -1), [Receiver("q", -1, -1, -1)])
    assert torch.equal(ours, paths(model, Sender(1, 1, "head", 3), [Receiver("q", 2, 1, 3)]))


def test_the_three_ways_to_reduce_agree() -> None:
    model, sender, receivers = (
        case("huginn", torch.float64),
        Sender(0, 0, "attn"),
        [Receiver("readout"), Receiver("mlp", 2, 1)],
    )
    kept, metric = paths(model, sender, receivers), everywhere(model)
    assert kept.shape == (2, 2)
    torch.testing.assert_close(paths(model, sender, receivers, reduce="mean"), kept.mean(-1), **EXACT)
    scalar = paths(model, sender, receivers, lambda logits: metric(logits).sum(), reduce="scalar")
    torch.testing.assert_close(scalar, kept.sum(-1), **EXACT)


def test_clean_into_clean_changes_nothing() -> None:
    for name in ("huginn", "ouro-gqa"):
        model = case(name, torch.float64)
        clean, _ = prompts(model, pos=LENGTH)
        receivers = [Receiver("q", 1, 1), Receiver("mlp", 2, 0), Receiver("readout")]
        cache, metric = run_clean(model, clean, LOOPS), everywhere(model)
        values = path_patch(
            model,
            clean,
            source=cache,
            metric=metric,
            sender=Sender(0, 1, "head", 0),
            receivers=receivers,
            reduce="none",
            n_loops=LOOPS,
        ).values
        with torch.no_grad():
            expected = metric(model(clean, LOOPS)).expand(3, -1)
        torch.testing.assert_close(values, expected, **EXACT)


def test_a_run_from_a_given_state_needs_no_prelude() -> None:
    model = make(torch.float64, n_prelude=1)
    clean, corrupted = prompts(model, pos=LENGTH)
    state = noise_like(torch.empty(2, LENGTH, 16, dtype=torch.float64))
    cache = run_clean(model, clean, initial_state=state)
    where = {"sender": Sender(0, 0, "mlp"), "receivers": [Receiver("readout")]}
    options = {"source": cache, "metric": everywhere(model), "reduce": "none", "initial_state": state}
    values = path_patch(model, corrupted, **where, **options).values
    with torch.no_grad():  # nothing reads the tokens, so the runs are the same
        torch.testing.assert_close(values[0], everywhere(model)(model(clean, initial_state=state)), **EXACT)


# Errors, before anything runs.


@pytest.mark.parametrize(
    ("sender", "receiver"),
    [
        (Sender(1, 0, "head", 0), Receiver("q", 0, 1)),
        (Sender(1, 1, "mlp"), Receiver("v", 1, 0)),
        (Sender(1, 1, "mlp"), Receiver("mlp", 1, 1)),
        (Sender(1, 1, "head", 0), Receiver("q", 1, 1)),
        (Sender(1, 1, "attn"), Receiver("k", 1, 1, 0)),
        (Sender(-1, 0, "attn"), Receiver("mlp", 1, 1)),
    ],
)
def test_a_receiver_before_the_sender_is_refused(no_runs: None, sender: Sender, receiver: Receiver) -> None:
    with pytest.raises(InputError, match="reads before .* writes, so there is no path between them"):
        paths_without_running(sender, [receiver])


@pytest.mark.parametrize(
    ("sender", "receivers", "message"),
    [
        ((0, 0, "mlp"), [], "receivers is empty"),
        ((3, 0, "mlp"), [("readout",)], "loop 3 is out of range: 3 exist"),
        ((0, 2, "mlp"), [("readout",)], "layer 2 is out of range: 2 exist"),
        ((0, 0, "head", 4), [("readout",)], "head 4 is out of range: 4 exist"),
        ((0, 0, "head"), [("readout",)], "a sender has a head where its kind is 'head', and only there"),
        ((0, 0, "mlp", 1), [("readout",)], "a sender has a head where its kind is 'head', and only there"),
        ((0, 0, "z"), [("readout",)], "a sender's kind must be one of .*, got 'z'"),
        ((0, 0, "mlp"), [("z", 1, 1)], "a receiver's kind must be one of .*, got 'z'"),
        ((0, 0, "mlp"), [("q", 1)], "layer must be an integer, got None"),
        ((0, 0, "mlp"), [("q", 1, 0, 4)], "head 4 is out of range: 4 exist"),
        ((0, 0, "mlp"), [("k", 1, 0, 2)], "head 2 is out of range: 2 exist"),
        ((0, 0, "mlp"), [("mlp", 1, 0, 0)], "an mlp has no heads: leave head out of Receiver"),
        ((0, 0, "mlp"), [("readout", 1)], "the readout has no loop, layer or head: leave them out"),
    ],
)
def test_what_the_model_does_not_have_is_refused(
    no_runs: None, as_a_user: None, sender: Any, receivers: Any, message: str
) -> None:
    with pytest.raises(InputError, match=message):
        paths_without_running(Sender(*sender), [Receiver(*receiver) for receiver in receivers])


def paths_without_running(sender: Sender, receivers: list[Receiver]) -> None:
    model = case("added")
    path_patch(
        model,
        prompts(model, pos=LENGTH)[1],
        source=CACHE[0],
        metric=all_logits,
        sender=sender,
        receivers=receivers,
        n_loops=LOOPS,
    )


CACHE: list[Any] = []


@pytest.fixture
def no_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """The model's own forward fails, so an error that comes from elsewhere came before any run."""
    model = case("added")
    CACHE[:] = [run_clean(model, prompts(model, pos=LENGTH)[0], LOOPS)]

    def run(*args: Any, **options: Any) -> None:
        raise AssertionError("the model was run")

    monkeypatch.setattr(type(model), "execute", run)
    monkeypatch.setattr(type(model.transformer), "forward", run)


def test_a_cache_without_the_senders_output_and_several_metrics_are_refused(no_runs: None, as_a_user: None) -> None:
    model = case("added")
    corrupted, where = (
        prompts(model, pos=LENGTH)[1],
        {"sender": Sender(0, 0, "mlp"), "receivers": [Receiver("readout")]},
    )
    some = CACHE[0].apply_slice_to_loops([1])
    with pytest.raises(InputError, match=r"the source's cache has no 'blocks.0.loop.0.hook_mlp_out'"):
        path_patch(model, corrupted, LOOPS, source=some, metric=all_logits, **where)
    two: Any = {"one": all_logits, "two": all_logits}
    with pytest.raises(InputError, match=r"path_patch takes one metric, not a mapping of \['one', 'two'\]"):
        path_patch(model, corrupted, LOOPS, source=CACHE[0], metric=two, **where)
