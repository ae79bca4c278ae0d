"""What counts as an edit is decided by the numbers, at every site alike, and watching waits for nothing."""

from __future__ import annotations

import pytest
import torch
from helpers import TINY, make, noise_like, tiny, tokens_for
from test_hooks import names_of

from tl_looped import HookSite, LoopedModel
from tl_looped.engine.schedule import DEAD_ENDS


@pytest.fixture(params=TINY)
def model(request: pytest.FixtureRequest) -> LoopedModel:
    return tiny(request.param)


def returned(x, hook):
    return x + 0.5 * noise_like(x)


def in_place(x, hook):
    x += 0.5 * noise_like(x)


def through_data(x, hook):
    x.data += 0.5 * noise_like(x)


def through_numpy(x, hook):
    array = x.detach().numpy()
    array += 0.5 * noise_like(x.detach()).numpy()


def one_of_each(model: LoopedModel) -> list[str]:
    """A name of every component that the model reads."""
    names = {HookSite.parse(name).component: name for name in names_of(model, 2)}
    return [name for component, name in names.items() if component not in DEAD_ENDS]


@pytest.mark.parametrize(("family", "grad"), [*((family, False) for family in TINY), ("huginn", True)])
def test_every_way_to_write_is_the_same_edit_at_every_site(family: str, grad: bool):
    """Also at scores, patterns, results and norms, which are formed beside the fast path."""
    model = tiny(family)
    tokens = tokens_for(model, batch=1, pos=4)
    with torch.set_grad_enabled(grad):
        clean = model(tokens, n_loops=2)
        for name in one_of_each(model):
            logits = [
                model.run_with_hooks(tokens, n_loops=2, fwd_hooks=[(name, edit)])
                for edit in (returned, in_place, through_data, through_numpy)
            ]
            assert all(torch.equal(one, logits[0]) for one in logits), name
            assert not torch.equal(logits[0], clean), name


@pytest.mark.parametrize("grad", [False, True])
def test_the_same_numbers_change_nothing_to_the_bit(model: LoopedModel, grad: bool):
    """Copied, written over with themselves, or changed and changed back."""

    def over(x, hook):
        x.data.copy_(x.detach().clone())

    def there_and_back(x, hook):
        kept = x.detach().clone()
        x.data.zero_()
        x.data.copy_(kept)

    tokens = tokens_for(model)
    with torch.set_grad_enabled(grad):
        clean = model(tokens, n_loops=2)
        for edit in (lambda x, hook: x.clone(), over, there_and_back):
            assert torch.equal(model.run_with_hooks(tokens, n_loops=2, fwd_hooks=[(lambda _: True, edit)]), clean)


def test_one_number_is_an_edit():
    """One entry of one pattern of a batch, by the least that float32 can tell."""
    model = tiny("llama")
    tokens = tokens_for(model)

    def nudge(x, hook):
        x[1, 2, 3, 0] = torch.nextafter(x[1, 2, 3, 0], torch.ones(()))

    def as_it_is(x, hook):
        return None

    name = "blocks.1.loop.1.attn.hook_pattern"
    fired = []
    point = model.hook_dict.shared(name)
    for edit in (nudge, as_it_is):
        with model.hooks([(name, edit)]):
            fired.append(point.fire(torch.rand(2, 4, 5, 5), 1)[1])
    assert [bool(one) for one in fired] == [True, False]
    assert point.fire(torch.rand(2, 4, 5, 5), 1)[1] is None
    assert torch.isfinite(model.run_with_hooks(tokens, fwd_hooks=[(name, nudge)])).all()


def test_what_is_not_a_number_is_no_edit(model: LoopedModel):
    """A row that has become NaN is watched without a change to the others, nor to itself."""
    tokens = tokens_for(model)

    def break_first_row(x, hook):
        x[0] = torch.nan

    hooks = [("loop.0.hook_state_pre", break_first_row)]
    with torch.no_grad(), model.hooks(hooks):
        clean = model(tokens, n_loops=2)
        watched = model.run_with_hooks(tokens, n_loops=2, fwd_hooks=[(lambda _: True, lambda x, hook: x.clone())])
    assert clean[0].isnan().all()
    assert clean[1].isfinite().all()
    assert torch.equal(clean.nan_to_num(), watched.nan_to_num())


@pytest.mark.parametrize(("reads_only", "edits"), [(True, False), (False, False), (False, True)])
def test_hooks_wait_for_nothing(model: LoopedModel, monkeypatch: pytest.MonkeyPatch, reads_only: bool, edits: bool):
    """No number is looked at by the host while the layers run: on a GPU each look would stop it."""
    run = model.batch(tokens_for(model), n_loops=2)
    frame, seen = model.frame(run), []

    def waits(*args, **kwargs):
        raise AssertionError("the host waited for a number")

    def look(x, hook):
        seen.append(hook.name)
        return x.clone() if edits else None

    with model.hooks(), torch.no_grad():
        for point in model.hook_dict.points():
            point.add_hook(look, level=model.context_level, reads_only=reads_only)
        with monkeypatch.context() as patched:
            for name in ("__bool__", "item", "tolist", "__float__", "__int__"):
                patched.setattr(torch.Tensor, name, waits)
            patched.setattr(torch, "equal", waits)
            state = model.transformer(run.tokens, frame, run.state, 0, 2)
            model.transformer.readout(state, frame)
    assert len(seen) == len(names_of(model, 2))


def test_watching_without_gradients_forms_no_output_twice(monkeypatch: pytest.MonkeyPatch):
    """Where a hook only reads, the explicit output is not computed beside the fast one."""
    model = make(**TINY["llama"])
    products = []
    original = torch.Tensor.__matmul__
    monkeypatch.setattr(torch.Tensor, "__matmul__", lambda a, b: products.append(a.shape) or original(a, b))
    with torch.no_grad():
        model.run_with_cache(tokens_for(model), n_loops=1, names_filter="blocks.0.attn.hook_pattern")
    assert len(products) == 1  # q kᵀ, and no pattern @ v


def test_a_returned_tensor_is_not_written_into_by_the_next_hook():
    """What one hook returns may be the caller's own, as an activation of another cache."""
    model = tiny("huginn")
    tokens, name = tokens_for(model), "blocks.0.loop.1.hook_resid_post"
    given = noise_like(model.run_with_cache(tokens, names_filter=name)[1][name])
    kept = given.clone()
    model.run_with_hooks(tokens, fwd_hooks=[(name, lambda x, hook: given), (name, in_place)])
    assert torch.equal(given, kept)
