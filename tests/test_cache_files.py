"""Caches in files, and copies of caches: activations and run, never the model."""

from __future__ import annotations

import copy
import io
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from helpers import TINY, make, noise_like, tiny, tokens_for

from tl_looped import HookNameError, InputError, LoopedCache, LoopedModel
from tl_looped.patching import patch_sweep


@pytest.fixture(params=TINY)
def model(request: pytest.FixtureRequest) -> LoopedModel:
    return tiny(request.param)


def assert_equal(found: LoopedCache, cache: LoopedCache) -> None:
    assert list(found) == list(cache) or set(found) == set(cache)
    assert all(torch.equal(found[name], cache[name]) and found[name].dtype == cache[name].dtype for name in cache)
    assert (found.kept_loops, found.has_batch_dim, found.cfg) == (cache.kept_loops, cache.has_batch_dim, cache.cfg)
    assert repr(found) == repr(cache)
    for field in fields(cache.run):
        one, other = getattr(found.run, field.name), getattr(cache.run, field.name)
        assert torch.equal(one, other) if isinstance(other, torch.Tensor) else one == other, field.name


@pytest.mark.parametrize(
    "options", [{}, {"loops": [0, -1]}, {"return_type": "loss", "incl_bwd": True}, {"stop_at_loop": 1}, {"seed": 7}]
)
def test_a_cache_comes_back_from_its_file(model: LoopedModel, tmp_path: Path, options):
    mask = torch.tensor([[0, 1, 1, 1, 1], [1, 1, 1, 1, 1]])
    _, cache = model.run_with_cache(tokens_for(model), n_loops=3, attention_mask=mask, **options)
    path = cache.save(tmp_path / "cache.safetensors")
    found = LoopedCache.load(path, model)
    assert_equal(found, cache)
    assert found.model is model
    assert torch.equal(found.stack("resid_post"), cache.stack("resid_post"))
    assert torch.equal(found["state_post", -3 if "stop_at_loop" in options else 0], cache["state_post", 0])


def test_a_cache_from_a_file_is_a_source_of_patching(tmp_path: Path):
    model = tiny("huginn")
    clean, corrupted = tokens_for(model, batch=1), tokens_for(model, batch=1, seed=8)
    _, cache = model.run_with_cache(clean, initial_state=noise_like(model(clean, stop_at_loop=0)))
    found = LoopedCache.load(cache.save(tmp_path / "cache"), model)
    sweeps = [
        patch_sweep(
            model, corrupted, source=source, metric=lambda x: x[0, -1, 0], initial_state=cache.run.state, progress=False
        )
        for source in (cache, found)
    ]
    assert torch.equal(sweeps[0].values, sweeps[1].values)


def test_batch_and_bfloat16_come_back(tmp_path: Path):
    model = make(torch.bfloat16, **TINY["ouro"])
    _, cache = model.run_with_cache(tokens_for(model, batch=1), remove_batch_dim=True)
    found = LoopedCache.load(cache.save(tmp_path / "cache"), model)
    assert_equal(found, cache)
    assert found["resid_post", 0, 0].dtype == torch.bfloat16


def test_a_pickle_takes_no_model_along():
    model = make(**{**TINY["llama"], "d_vocab": 5000})  # 300 kB of weights that a cache does not need
    _, cache = model.run_with_cache(tokens_for(model, batch=1), names_filter="hook_state_post")
    file = io.BytesIO()
    torch.save(cache, file)
    assert len(file.getvalue()) < 50_000
    file.seek(0)
    found = torch.load(file, weights_only=False)
    assert_equal(found, cache)
    assert found.model is None
    assert torch.equal(found["state_post", -1], cache["state_post", 1])
    assert found.apply_slice_to_loops(1).kept_loops == (1,)
    with pytest.raises(HookNameError, match="layer 9 is out of range: 2 exist"):
        found["resid_post", 9, 0]


def test_copies_keep_the_model():
    model = tiny("llama")
    _, cache = model.run_with_cache(tokens_for(model))
    flat, deep = copy.copy(cache), copy.deepcopy(cache)
    assert flat.model is deep.model is model
    assert_equal(flat, cache)
    assert_equal(deep, cache)
    deep["state_post", 0].zero_()
    assert not torch.equal(deep["state_post", 0], cache["state_post", 0])
    del flat.cache_dict["hook_embed"]
    assert "hook_embed" in cache


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "can't be read as a cache"),
        (b"{}", "can't be read as a cache"),
        ("other", "but not a cache of tl_looped"),
    ],
)
def test_files_that_are_no_caches(tmp_path: Path, content, message: str):
    path = tmp_path / "file"
    if content == "other":
        from safetensors.torch import save_file

        save_file({"x": torch.zeros(1)}, path)
    elif content is not None:
        path.write_bytes(content)
    with pytest.raises(InputError, match=message):
        LoopedCache.load(path, tiny("llama"))


def test_the_cache_of_another_model(tmp_path: Path, as_a_user: None):
    model = tiny("llama")
    _, cache = model.run_with_cache(tokens_for(model))
    path = cache.save(tmp_path / "cache")
    message = "was cached from 'custom', which differs from this model in n_prelude, .*: pass the model that made it"
    with pytest.raises(InputError, match=message):
        LoopedCache.load(path, tiny("ouro"))
    with pytest.raises(InputError, match="loaded for the LoopedModel that made it, got UnrolledModel"):
        LoopedCache.load(path, model.unrolled())
    with pytest.raises(InputError, match="there is no folder"):
        cache.save(tmp_path / "none" / "cache")
