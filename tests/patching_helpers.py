"""What the tests of patching share: models, prompts that differ at one token, and one cell of a sweep done by hand."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from typing import Any

import torch
from helpers import FAMILIES, make, parity
from torch import Tensor

from tl_looped import LoopedModel
from tl_looped.engine.cache import LoopedCache

# Choices that no published family makes, beside the published ones.
OTHERS: dict[str, dict[str, Any]] = {
    "bare": {},
    "added": {"n_prelude": 1, "n_coda": 1, "injection": "add", "n_key_value_heads": 2},
    "mixed": {"n_coda": 1, "injection": "add", "state_init": "zeros", "loop_norm": "each"}
    | {"norm_placement": "residual_sandwich", "qk_bias": True},
}
CASES = [*FAMILIES, *OTHERS]
CHANGED = 2
"""The position at which the clean and the corrupted prompts differ."""

# Site -> (name after the layer or the loop, axis of the sweep -> axis of the activation).
POS, HEADS, NEURONS = {"pos": 1}, {"pos": 1, "head": 2}, {"pos": 1, "neuron": 2}
PATTERN = {"head": 1, "pos": 2, "key": 3}
LAYER_SITES = {
    "resid_pre": ("hook_resid_pre", POS),
    "resid_mid": ("hook_resid_mid", POS),
    "resid_post": ("hook_resid_post", POS),
    "attn_out": ("hook_attn_out", POS),
    "mlp_out": ("hook_mlp_out", POS),
    "q": ("attn.hook_q", HEADS),
    "k": ("attn.hook_k", HEADS),
    "v": ("attn.hook_v", HEADS),
    "z": ("attn.hook_z", HEADS),
    "pattern": ("attn.hook_pattern", PATTERN),
    "post": ("mlp.hook_post", NEURONS),
}
LOOP_SITES = {
    "state": ("hook_state_pre", POS),
    "injection": ("hook_injection", POS),
    "state_post": ("hook_state_post", POS),
}
ONCE_SITES = {"initial_state": ("hook_state_init", POS), "embed": ("hook_embed", POS)}
SITES = {**LAYER_SITES, **LOOP_SITES, **ONCE_SITES}


@lru_cache
def case(name: str, dtype: torch.dtype = torch.float32) -> LoopedModel:
    """A model by the name of its case. Tests share it, so they leave no hook and no changed weight behind."""
    return parity(name, dtype) if name in FAMILIES else make(dtype, **OTHERS[name])


def prompts(model: LoopedModel, batch: int = 2, pos: int = 5, changed: int = CHANGED) -> tuple[Tensor, Tensor]:
    """(clean, corrupted) tokens that differ at one position."""
    generator = torch.Generator().manual_seed(5)
    clean = torch.randint(model.cfg.d_vocab, (batch, pos), generator=generator)
    corrupted = clean.clone()
    corrupted[:, changed] = (corrupted[:, changed] + 7) % model.cfg.d_vocab
    return clean, corrupted


@torch.no_grad()
def run_clean(model: LoopedModel, tokens: Tensor, n_loops: int | None = None, **options: Any) -> LoopedCache:
    """Everything of a run, also each head's result."""
    return model.run_with_cache(tokens, n_loops, names_filter=lambda name: True, **options)[1]


@lru_cache(maxsize=4)
def both_clean(model: LoopedModel, pos: int, n_loops: int) -> tuple[LoopedCache, LoopedCache]:
    """`run_clean` of both prompts, once for many cells. Nothing that a test has asked for changes them or the model."""
    clean, corrupted = prompts(model, pos=pos)
    return run_clean(model, clean, n_loops), run_clean(model, corrupted, n_loops)


def direction(model: LoopedModel) -> Callable[[Tensor], Tensor]:
    """A metric for each prompt: a fixed random direction in the last position's logits."""
    weights = torch.randn(model.cfg.d_vocab, generator=torch.Generator().manual_seed(6), dtype=torch.float64)
    return lambda logits: logits[:, -1] @ weights.to(logits)


def everywhere(model: LoopedModel) -> Callable[[Tensor], Tensor]:
    """A metric for each prompt that reads all positions and is not linear in the logits."""
    weights = torch.randn(model.cfg.d_vocab, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    return lambda logits: (logits.log_softmax(-1) @ weights.to(logits)).pow(2).sum(-1)


def site_name(component: str, layered: bool, looped: bool, layer: int, loop: int) -> str:
    """The hook name, put together here and not by the package."""
    if not looped:
        return component
    return f"blocks.{layer}.loop.{loop}.{component}" if layered else f"loop.{loop}.{component}"


def writes(
    model: LoopedModel, n_loops: int, site: str, at: dict[str, int], when: str = "at", source_loop: int | None = None
) -> Iterator[tuple[str, str]]:
    """(name that a cell writes, name that its values come from)."""
    component = SITES[site][0] if site in SITES else site
    layered, looped = (
        site in LAYER_SITES or component.startswith(("attn.", "mlp.", "ln1", "ln2")),
        site not in ONCE_SITES,
    )
    looped = looped and not component.startswith(("ln_final", "ln_coda"))
    t = at.get("loop", 0)
    loops = [t] if when == "at" else range(n_loops) if when == "every" else range(t, n_loops)
    if not looped:
        loops = [0]
    layers = [at["layer"]] if "layer" in at else range(model.cfg.n_core) if layered else [0]
    for loop, layer in itertools.product(loops, layers):
        origin = at.get("source_loop", source_loop)
        if origin is None:
            origin = t if when == "clamp" else loop
        yield (
            site_name(component, layered, looped, layer, loop),
            site_name(component, layered, looped, layer, origin % n_loops),
        )


@torch.no_grad()
def by_hand(
    model: LoopedModel,
    corrupted: Tensor,
    give: Callable[[str, Tensor], Tensor],
    n_loops: int,
    site: str,
    at: dict[str, int],
    dims: dict[str, int] | None = None,
    when: str = "at",
    source_loop: int | None = None,
    **options: Any,
) -> Tensor:
    """Logits of one cell: one whole run with one hook for each name. `give(name, activation)` is the source."""
    dims = SITES[site][1] if dims is None else dims

    def writer(origin: str) -> Callable[..., Tensor]:
        def write(x: Tensor, hook: Any) -> Tensor:
            patched = x.clone()
            index = [slice(None)] * x.ndim
            for axis, dim in dims.items():
                if axis in at:
                    index[dim] = at[axis]
            patched[tuple(index)] = give(origin, x)[tuple(index)]
            return patched

        return write

    hooks = [(name, writer(origin)) for name, origin in writes(model, n_loops, site, at, when, source_loop)]
    return model.run_with_hooks(corrupted, n_loops, fwd_hooks=hooks, **options)


def cells(sizes: dict[str, int], n: int | None = None, seed: int = 8) -> list[dict[str, int]]:
    """Coordinates of `n` cells drawn at random, or of all."""
    all_of_them = [dict(zip(sizes, at, strict=True)) for at in itertools.product(*map(range, sizes.values()))]
    if n is None or n >= len(all_of_them):
        return all_of_them
    order = torch.randperm(len(all_of_them), generator=torch.Generator().manual_seed(seed))
    return [all_of_them[int(i)] for i in order[:n]]


def legal_axes(site: str) -> list[tuple[str, ...]]:
    """Every set of axes that a site can be swept over."""
    has = [*(["loop", "source_loop"] if site not in ONCE_SITES else []), *(["layer"] if site in LAYER_SITES else [])]
    has += SITES[site][1]
    return [axes for size in range(1, len(has) + 1) for axes in itertools.combinations(has, size)]


def sizes_of(model: LoopedModel, site: str, axes: Sequence[str], n_loops: int, pos: int) -> dict[str, int]:
    """How long each axis of a sweep is."""
    heads = model.cfg.kv_heads if site in ("k", "v", "attn.hook_rot_k") else model.cfg.n_heads
    every = {"loop": n_loops, "source_loop": n_loops, "layer": model.cfg.n_core, "pos": pos, "key": pos}
    every |= {"head": heads, "neuron": model.cfg.d_mlp}
    return {axis: every[axis] for axis in axes}


def short_prompts(model: LoopedModel) -> tuple[Tensor, Tensor]:
    """(clean, corrupted) of three tokens, for TransformerLens's patching, which runs one forward for every cell."""
    return prompts(model, pos=3, changed=1)


def assert_same(name: str, ours: Any, theirs: Any) -> None:
    """Equal up to rounding in float32, also in tuples, or plainly equal."""
    if isinstance(ours, Tensor):
        assert ours.shape == theirs.shape, name
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5, msg=lambda text: f"{name}: {text}")
    elif isinstance(ours, tuple):
        assert len(ours) == len(theirs), name
        for one, other in zip(ours, theirs, strict=True):
            assert_same(name, one, other)
    else:
        assert ours == theirs, name
