"""Bad input to the patching functions: an error that says what to do, before the model is run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import hook_count, make, noise_like, tokens_for, word_tokenizer
from patching_helpers import CHANGED, case, prompts, run_clean
from torch import Tensor
from transformer_lens import ActivationCache
from transformer_lens.utilities.slice import Slice

from tl_looped import LoopedModel
from tl_looped.engine.cache import LoopedCache
from tl_looped.engine.errors import HookNameError, InputError
from tl_looped.engine.schedule import HookSite
from tl_looped.patching import (
    Receiver,
    Sender,
    attribution_sweep,
    checks,
    fixed,
    mean_source,
    patch_sweep,
    path_patch,
    zero,
)

LENGTH = 4


def total(logits: Tensor) -> Tensor:
    return logits.sum()


def sweep(model: LoopedModel, corrupted: Any, source: Any, **options: Any) -> Any:
    options = {"metric": total, "site": "resid_pre", "axes": ("loop", "layer", "pos"), "progress": False, **options}
    return patch_sweep(model, corrupted, source=source, **options)


def attribute(model: LoopedModel, corrupted: Any, source: Any, **options: Any) -> Any:
    options = {"metric": total, "axes": ("loop", "layer", "pos"), "progress": False, **options}
    return attribution_sweep(model, corrupted, source=source, **options)


def path(model: LoopedModel, corrupted: Any, source: Any, **options: Any) -> Any:
    options = {"metric": total, "sender": Sender(0, 0, "mlp"), "receivers": [Receiver("readout")], **options}
    return path_patch(model, corrupted, source=source, **options)


every_function = pytest.mark.parametrize("function", [sweep, attribute, path])


class Refused:
    """`with refused(message):` an error with this message, and nothing was run and no hook is left."""

    def __init__(self, patch: pytest.MonkeyPatch):
        self.patch = patch

    def __call__(self, message: str, kind: type[Exception] = InputError) -> Any:
        return _Refusal(self.patch, pytest.raises(kind, match=message))


class _Refusal:
    def __init__(self, patch: pytest.MonkeyPatch, raises: Any):
        self.patch, self.raises = patch, raises

    def __enter__(self) -> None:
        def run(*args: Any, **options: Any) -> None:
            raise AssertionError("the model was run")

        self.patch.setattr(LoopedModel, "execute", run)
        self.patch.setattr(LoopedModel, "frame", run)
        self.raises.__enter__()

    def __exit__(self, *error: Any) -> bool:
        self.patch.undo()
        return self.raises.__exit__(*error)


@pytest.fixture
def refused(as_a_user: None) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        yield Refused(patch)


def given(name: str = "added") -> tuple[LoopedModel, Tensor, LoopedCache]:
    """(model, corrupted prompts, cache of the clean ones)."""
    model = case(name)
    clean, corrupted = prompts(model, pos=LENGTH)
    return model, corrupted, run_clean(model, clean, 2)


# The prompts and the cache.


@every_function
def test_prompts_that_do_not_correspond(refused: Refused, function: Callable[..., Any]) -> None:
    model, corrupted, cache = given()
    needs = "Patching needs the same number of prompts, of the same length"
    with refused(rf"tokens of shape \(2, 4\) and \(2, 3\). {needs}"):
        function(model, corrupted[:, :3], cache, n_loops=2)
    with refused(rf"tokens of shape \(2, 4\) and \(1, 4\). {needs}"):
        function(model, corrupted[:1], cache, n_loops=2)
    with refused(r"token id 24 is out of the vocabulary \[0, 24\)"):
        function(model, corrupted * 0 + 24, cache, n_loops=2)


def test_padding_at_different_places(refused: Refused) -> None:
    model = make(tokenizer=word_tokenizer())
    _, cache = model.run_with_cache(["a b c", "d e"])
    for function in (sweep, attribute, path):
        with refused("source and patched prompts have their padding at different places"):
            function(model, ["a b", "d e f"], cache)


@every_function
def test_a_cache_of_another_loop_count_seed_or_state(refused: Refused, function: Callable[..., Any]) -> None:
    model, corrupted, cache = given("retrofit-tinyllama")
    with refused("the source ran 2 loops, this call 3: pass n_loops=2, or cache the source again"):
        function(model, corrupted, cache, n_loops=3)
    with refused("the source ran 2 loops, this call 5"):
        function(model, corrupted, cache)
    with refused("the source's initial state was drawn with seed 0, this run's with 4"):
        function(model, corrupted, cache, n_loops=2, seed=4)
    state = noise_like(torch.empty(2, LENGTH, model.cfg.d_model))
    with refused("only one of the source and the patched run was given an initial state: give both the same"):
        function(model, corrupted, cache, n_loops=2, initial_state=state)
    theirs = run_clean(model, corrupted, 2, initial_state=state)
    with refused("only one of the source and the patched run was given an initial state"):
        function(model, corrupted, theirs, n_loops=2)
    with refused("the source and the patched run were given different initial states"):
        function(model, corrupted, theirs, n_loops=2, initial_state=state + 1)
    for options in ({"initial_state": state, "seed": 1}, {"seed": -1}):
        with refused("initial_state and seed both given|seed must be an integer of at least 0"):
            function(model, corrupted, cache, n_loops=2, **options)


@every_function
def test_a_cache_of_another_course(refused: Refused, function: Callable[..., Any]) -> None:
    model, corrupted, _ = given("retrofit-tinyllama")
    ran = "the source ran with another attention_mask, other position_ids, or from a later loop"
    positions = torch.arange(LENGTH).expand(2, -1) + 3
    everyone = torch.ones(2, LENGTH, LENGTH)
    for options in ({"position_ids": positions}, {"attention_mask": everyone}):
        other = run_clean(model, corrupted, 2, **options)
        with refused(ran):
            function(model, corrupted, other, n_loops=2)
    state = noise_like(torch.empty(2, LENGTH, model.cfg.d_model))
    later = run_clean(model, corrupted, 2, initial_state=state, start_at_loop=1)
    with refused(ran):
        function(model, corrupted, later, n_loops=2, initial_state=state)


@every_function
def test_a_cache_that_lacks_what_is_patched(refused: Refused, function: Callable[..., Any]) -> None:
    model, corrupted, cache = given()
    clean, _ = prompts(model, pos=LENGTH)
    lacks = r"the source's cache has no 'blocks.0.loop.0.hook_\w+' \(and \d more that this call reads\): run it with"
    embeddings = model.run_with_cache(clean, 2, names_filter="hook_embed")[1]
    single = model.run_with_cache(clean[:1], 2, remove_batch_dim=True)[1]
    with refused(lacks):
        function(model, corrupted, embeddings, n_loops=2)
    with refused(lacks):
        function(model, corrupted, cache.apply_slice_to_loops([1]), n_loops=2)
    with refused("the source's cache has no batch axis: run it without remove_batch_dim"):
        function(model, corrupted[:1], single, n_loops=2)


@every_function
def test_a_cache_of_some_rows_or_positions_only(refused: Refused, function: Callable[..., Any]) -> None:
    """One row or position would broadcast to all, and give a number."""
    model, corrupted, cache = given()
    clean, _ = prompts(model, pos=LENGTH)
    with refused(r"has 1 along 'batch', the patched prompts 2: take the source from 2 prompts of 4 tokens"):
        function(model, corrupted, cache.apply_slice_to_batch_dim([1]), n_loops=2)
    for pos_slice in (-1, [0]):
        part = model.run_with_cache(clean, 2, pos_slice=pos_slice)[1]
        with refused(r"has 1 along 'pos', the patched prompts 4: .* without pos_slice or rows left out\."):
            function(model, corrupted, part, n_loops=2)
    part = model.run_with_cache(clean, 2, pos_slice=Slice(-1))[1]
    with refused(r"has shape \(2, 16\) instead of \['batch', 'pos', 'd_model'\]: cache it without pos_slice"):
        function(model, corrupted, part, n_loops=2)


@every_function
def test_what_is_no_source(refused: Refused, function: Callable[..., Any]) -> None:
    model, corrupted, cache = given()
    for source in (cache.cache_dict, ActivationCache(cache.cache_dict, model), model.unrolled(2).view(cache), None):
        with refused(r"the source must be a LoopedCache of model.run_with_cache, or .*zero\(\), fixed\(...\) or mean"):
            function(model, corrupted, source, n_loops=2)


# The model.


@every_function
def test_a_model_in_training_mode(refused: Refused, function: Callable[..., Any]) -> None:
    model = make(injection="add")
    clean, corrupted = prompts(model, pos=LENGTH)
    cache = run_clean(model, clean)
    for module in (model, model.transformer.blocks[1].mlp):
        module.train()
        with refused("the model is in training mode: call model.eval"):
            function(model, corrupted, cache)
        model.eval()
    function(model, corrupted, cache)


@every_function
@pytest.mark.parametrize("how", [{}, {"dir": "bwd"}, {"is_permanent": True}])
def test_a_model_with_hooks(refused: Refused, function: Callable[..., Any], how: dict[str, Any]) -> None:
    model = make(injection="add")
    clean, corrupted = prompts(model, pos=LENGTH)
    cache = run_clean(model, clean)
    model.add_hook("blocks.1.loop.1.attn.hook_z", lambda x, hook: None, **how)
    with refused(r"has hooks already, at 'blocks.1.attn.hook_z': call model.reset_hooks\(\)"):
        function(model, corrupted, cache)
    assert hook_count(model) == 1
    model.reset_hooks(including_permanent=True)


# The metric. Its shape and its values are known after one run, of the unpatched prompts.


@every_function
@pytest.mark.parametrize(
    ("reduce", "metric", "message"),
    [
        (
            "scalar",
            lambda x: x[:, 0, 0],
            r"must return shape \(\) with reduce='scalar', got \(2,\); or pass reduce='none'",
        ),
        ("none", total, r"must return shape \(2,\) with reduce='none', got \(\)\."),
        ("mean", lambda x: x[:, 0], r"must return shape \(2,\) with reduce='mean', got \(2, 24\)\."),
        ("scalar", lambda x: x.sum() * float("nan"), "metric 'metric' gives NaN: check what it divides by"),
        ("none", lambda x: torch.full((2,), float("nan")), "metric 'metric' gives NaN"),
    ],
)
def test_a_metric_that_can_not_be_used(
    function: Callable[..., Any], reduce: str, metric: Any, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, corrupted, cache = given()
    runs, network = [], type(model.transformer)
    begin = network.begin
    monkeypatch.setattr(network, "begin", lambda *args, **kwargs: runs.append(1) or begin(*args, **kwargs))
    with pytest.raises(InputError, match=message):
        function(model, corrupted, cache, metric=metric, reduce=reduce, n_loops=2)
    assert runs == [1] and hook_count(model) == 0


def test_a_metric_that_breaks_later_names_itself_and_the_cell() -> None:
    model, corrupted, cache = given()
    with torch.no_grad():
        untouched = total(model(corrupted, 2))

    def breaks(logits: Tensor) -> Tensor:
        return torch.where((total(logits) - untouched).abs() < 1e-4, 1.0, float("nan"))

    def looks(logits: Tensor) -> Tensor:
        return breaks(logits) if float(logits[0, 0, 0]) else logits[0, 0, 0]

    for metric in (breaks, looks):
        with pytest.raises(InputError, match=f"metric 'other' gives NaN at loop 0, layer 0, pos {CHANGED}: check what"):
            sweep(
                model,
                corrupted,
                cache,
                metric={"one": total, "other": metric},
                n_loops=2,
                axes=("loop", "layer", "pos"),
            )
    assert hook_count(model) == 0


@every_function
def test_what_is_no_metric(refused: Refused, function: Callable[..., Any]) -> None:
    model, corrupted, cache = given()
    with refused("reduce must be 'scalar', 'mean' or 'none', got 'sum'"):
        function(model, corrupted, cache, reduce="sum", n_loops=2)
    for metric in (3, {}, {"one": 3}):
        with refused("metric must be a function of logits, or a mapping of names to such, got "):
            function(model, corrupted, cache, metric=metric, n_loops=2)


# Sites, axes, loops.


@pytest.mark.parametrize(
    ("site", "axes", "axis", "has"),
    [
        ("resid_pre", ("loop", "head"), "head", r"\['layer', 'loop', 'pos', 'source_loop'\]"),
        ("state", ("loop", "layer"), "layer", r"\['loop', 'pos', 'source_loop'\]"),
        ("z", ("loop", "neuron"), "neuron", r"\['head', 'layer', 'loop', 'pos', 'source_loop'\]"),
        ("z", ("loop", "key"), "key", "head"),
        ("post", ("loop", "head"), "head", r"\['layer', 'loop', 'neuron', 'pos', 'source_loop'\]"),
        ("embed", ("loop", "pos"), "loop", r"\['pos'\]"),
        ("initial_state", ("source_loop",), "source_loop", r"\['pos'\]"),
    ],
)
def test_an_axis_that_the_site_does_not_have(refused: Refused, site: str, axes: Any, axis: str, has: str) -> None:
    model, corrupted, cache = given()
    for function in (sweep, attribute):
        if function is sweep or "source_loop" not in axes:
            with refused(f"site '{site}' has no axis '{axis}': its axes are .*{has}"):
                function(model, corrupted, cache, site=site, axes=axes, n_loops=2)


@pytest.mark.parametrize("axes", [(), ("loop", "loop"), ("loop", "row"), "loop"])
def test_what_are_no_axes(refused: Refused, axes: Any) -> None:
    model, corrupted, cache = given()
    for function in (sweep, attribute):
        with refused(r"axes must be some of \('source_loop', 'loop', .*\), each once, got "):
            function(model, corrupted, cache, axes=axes, n_loops=2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"when": "every"}, "when='every' and axes=.* do not go together: leave 'loop' out of axes"),
        (
            {"axes": ("layer", "pos")},
            "when='at' and axes=.* do not go together: put 'loop' into axes, or pass when='every'",
        ),
        ({"axes": ("pos",), "when": "from"}, "when='from' and axes=.* do not go together: put 'loop' into axes"),
        (
            {"when": "clamp", "source_loop": 0},
            "when='clamp' takes the source at the cell's own loop: leave source_loop",
        ),
        ({"when": "clamp", "axes": ("loop", "source_loop")}, "when='clamp' takes the source at the cell's own loop"),
        (
            {"axes": ("loop", "source_loop"), "source_loop": 1},
            "source_loop is an axis of this sweep and given as a value",
        ),
        ({"when": "always"}, r"when must be one of \('at', 'from', 'clamp', 'every'\), got 'always'"),
        (
            {"site": "embed", "axes": ("pos",), "source_loop": 0},
            "site 'embed' fires once in a run, so it has no source_loop",
        ),
        (
            {"site": "embed", "axes": ("pos",), "when": "clamp"},
            "site 'embed' fires once in a run, so it has no when='clamp'",
        ),
        ({"source_loop": 2}, r"source_loop 2 is out of range: 2 exist, so it must lie in \[-2, 1\]"),
        ({"source_loop": -3}, "source_loop -3 is out of range"),
        ({"source_loop": True}, "source_loop must be an integer, got True"),
    ],
)
def test_options_that_contradict_each_other(refused: Refused, options: dict[str, Any], message: str) -> None:
    model, corrupted, cache = given()
    with refused(message):
        sweep(model, corrupted, cache, n_loops=2, **options)


@pytest.mark.parametrize(
    ("site", "message"),
    [
        ("resid_pref", "there is no site 'resid_pref'. Nearest: 'resid_pre'"),
        ("stat", "there is no site 'stat'. Nearest: 'state"),
        ("patern", "there is no site 'patern'. Nearest: 'pattern'"),
        ("attn.hook_zz", "there is no site 'attn.hook_zz'"),
        (
            "blocks.0.hook_resid_pre",
            "'blocks.0.hook_resid_pre' names one place, and here a site of all places is needed: pass 'hook_resid_pre'",
        ),
        ("z3", "there is no site 'z3'"),
        ("", "there is no site ''"),
    ],
)
def test_a_site_that_does_not_exist(refused: Refused, site: str, message: str) -> None:
    model, corrupted, cache = given()
    for function in (sweep, attribute):
        with refused(message):
            function(model, corrupted, cache, site=site, n_loops=2)


@pytest.mark.parametrize(
    ("name", "site", "axes"),
    [
        ("bare", "hook_injection_in", ("loop",)),
        ("bare", "ln1_post.hook_scale", ("loop", "layer")),
        ("huginn", "hook_exit_gate", ("loop",)),
        ("huginn", "ln_loop.hook_scale", ("loop",)),
        ("ouro", "ln_final.hook_scale", ("pos",)),
    ],
)
def test_a_site_that_this_model_does_not_have(refused: Refused, name: str, site: str, axes: Any) -> None:
    model, corrupted, cache = given(name)
    for function in (sweep, attribute):
        for source in (cache, zero()):
            with refused(f"this model has no hook point '.*{site}'", HookNameError):
                function(model, corrupted, source, site=site, axes=axes, n_loops=2)


def test_the_embedding_of_a_run_that_does_not_read_it(refused: Refused) -> None:
    model = case("bare")
    _, corrupted = prompts(model, pos=LENGTH)
    state = noise_like(torch.empty(2, LENGTH, model.cfg.d_model))
    for function in (sweep, attribute):
        with refused("this run never reads its tokens: its initial state was given, and the model injects nothing"):
            function(model, corrupted, zero(), site="embed", axes=("pos",), initial_state=state)


# Memory.


def test_a_batch_that_would_not_fit(refused: Refused, monkeypatch: pytest.MonkeyPatch) -> None:
    model, corrupted, cache = given()
    each = checks.row_bytes(model.cfg, LENGTH, LENGTH, 4)
    asked = []
    monkeypatch.setattr(checks, "free_bytes", lambda device: asked.append(device) or 2 * 10 * each)
    with refused(r"batch_size=11 would need about 0.0 GiB: 10 fits"):
        sweep(model, corrupted, cache, batch_size=11, n_loops=2)
    assert asked == [torch.device("cpu")]
    ours = sweep(model, corrupted, cache, batch_size=10, n_loops=2)
    torch.testing.assert_close(ours.values, sweep(model, corrupted, cache, n_loops=2).values)
    monkeypatch.setattr(checks, "free_bytes", lambda device: 0)
    torch.testing.assert_close(ours.values, sweep(model, corrupted, cache, n_loops=2).values)  # the prompts at least


@pytest.mark.parametrize("batch_size", [1, 0, -5, 2.0, True])
def test_a_batch_smaller_than_the_prompts(refused: Refused, batch_size: Any) -> None:
    model, corrupted, cache = given()
    with refused(f"batch_size counts rows, so it must be an integer of at least the 2 prompts, got {batch_size}"):
        sweep(model, corrupted, cache, batch_size=batch_size, n_loops=2)


def test_free_memory_is_a_number_of_bytes() -> None:
    assert 2**20 < checks.free_bytes(torch.device("cpu")) < 2**50


# Sources that are made.


def test_means_that_do_not_fit(refused: Refused) -> None:
    model, corrupted, _ = given("retrofit-tinyllama")
    reference = tokens_for(model, 3, LENGTH + 1)
    longer, seeded = (
        mean_source(model, reference, n_loops=2),
        mean_source(model, reference[:, :LENGTH], n_loops=2, seed=3),
    )
    some, over_all = (
        mean_source(model, reference[:, :LENGTH], 2, names_filter="blocks.0.attn.hook_z"),
        mean_source(model, reference, n_loops=2, per_position=False),
    )
    with refused("has 5 along 'pos', the patched prompts 4: .*, or a mean with per_position=False"):
        sweep(model, corrupted, longer, n_loops=2)
    with refused("has 5 along 'query', the patched prompts 4.*rows left out.$"):
        sweep(model, corrupted, longer, site="pattern", n_loops=2)
    for site in ("pattern", "attn_scores"):
        with refused(f"this mean has no 'blocks.0.loop.0.attn.hook_{site}': over all queries .* per_position=True"):
            sweep(model, corrupted, over_all, site=site, n_loops=2)
    with refused("this mean has no 'blocks.0.loop.0.attn.hook_pattern': over all queries"):
        over_all.values(HookSite("attn.hook_pattern", "blocks", 0, 0), torch.zeros(2, 4, LENGTH, LENGTH))
    with refused("drawn with seed 3, this run's with 0"):
        sweep(model, corrupted, seeded, n_loops=2)
    with refused("the source ran 2 loops, this call 3"):
        sweep(model, corrupted, longer, n_loops=3)
    with refused("the source's cache has no 'blocks.0.loop.0.hook_resid_pre'"):
        sweep(model, corrupted, some, n_loops=2)


def test_a_mean_of_patterns_for_prompts_with_padding(refused: Refused) -> None:
    """Queries behind padding would see it, as the reference's see real tokens there; before it nothing is wrong."""
    for side in ("left", "right"):
        model = make(tokenizer=word_tokenizer(padding_side=side))
        source = mean_source(model, ["a b c", "d e f"])
        sweep(model, ["a b c", "f e d"], source, site="pattern")
        sweep(model, ["a b c", "a b"], source, site="v")
        if side == "right":
            sweep(model, ["a b c", "a b"], source, site="pattern")
            continue
        with refused("in the source of 'blocks.0.loop.0.attn.hook_pattern' queries see other keys than in the patched"):
            sweep(model, ["a b c", "a b"], source, site="pattern")


def test_a_reference_of_prompts_of_different_lengths(refused: Refused) -> None:
    model = make(tokenizer=word_tokenizer())
    with refused("the reference prompts differ in length, so their positions do not correspond"):
        mean_source(model, ["a b c", "a b"])


def test_a_given_tensor_that_does_not_fit() -> None:
    model, corrupted, _ = given()
    with pytest.raises(
        InputError, match=r"tensor of shape \(7,\) does not fit 'blocks.0.loop.0.hook_resid_pre' of \(2, 4, 16\)"
    ):
        sweep(model, corrupted, fixed(torch.ones(7)), n_loops=2)
    assert hook_count(model) == 0
