"""LoopedCache: TransformerLens's ActivationCache with a loop axis."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, NoReturn, cast

import torch
from torch import Tensor
from transformer_lens import ActivationCache
from transformer_lens.utilities.components_utils import get_act_name
from transformer_lens.utilities.slice import Slice

from tl_looped.engine.engine import Engine, ReturnType, check_return
from tl_looped.engine.errors import HookNameError, InputError, nearest, resolve_index
from tl_looped.engine.hooks import LoopHookPoint
from tl_looped.engine.reach import NamesFilter
from tl_looped.engine.runs import Run
from tl_looped.engine.schedule import BLOCK_AXES, CODA, CORE, LOOP_AXES, MODEL_AXES, PRELUDE, HookSite

_GRAD = "_grad"
_SHORT_NAMES = [name.rpartition("hook_")[2] for name in (*BLOCK_AXES, *LOOP_AXES, *MODEL_AXES)]


class CacheWriter:
    """The hook that stores activations (or gradients) under the name that has the loop in it.

    Args:
        store: where they go.
        device: where to keep them; None for where they are.
        pos_slice: TransformerLens's slice of positions (of queries, for patterns and scores).
        remove_batch_dim: drop a batch axis of size one.
    """

    def __init__(
        self,
        store: dict[str, Tensor],
        device: torch.device | str | None,
        pos_slice: Slice,
        remove_batch_dim: bool,
    ):
        self.store = store
        self.device = device
        self.pos_slice = pos_slice
        self.remove_batch_dim = remove_batch_dim

    def save(self, tensor: Tensor, hook: LoopHookPoint) -> None:
        """A forward hook."""
        self._put(hook.name, tensor, hook.site)

    def save_grad(self, grad: Tensor, hook: LoopHookPoint) -> None:
        """A backward hook."""
        self._put(hook.name + _GRAD, grad, hook.site)

    def _put(self, name: str, tensor: Tensor, site: HookSite) -> None:
        kept = tensor.detach()
        if self.pos_slice.mode != "identity":
            kept = self.pos_slice.apply(kept, dim=site.pos_axis).clone()  # a view would hold all positions
        if self.remove_batch_dim:
            kept = kept.squeeze(0)
        self.store[name] = kept.to(self.device)


class LoopedCache(ActivationCache):
    """Activations of one run, by site and loop.

    ========================================  =================================================================
    cache["resid_post", layer, loop]          a core layer in one loop; negative numbers count from the end
    cache["scale", layer, loop, "ln1"]        a norm's site, named as in TransformerLens
    cache["state_post", loop]                 a site of the loop itself
    cache["prelude.resid_post", layer]        a layer that runs once; also "coda.…"
    cache["coda.scale", layer, None, "ln1"]   a norm's site in it
    cache["embed"]                            a site that fires once
    cache["blocks.2.loop.3.attn.hook_z"]      any full name
    cache.stack("pattern", layer)             all cached loops, [loop, ...]
    cache.stack("resid_post")                 all cached loops and layers, [loop, layer, ...]
    ========================================  =================================================================

    Reading a site of a loop without saying which raises, and names the loops that are cached. Gradients have the same
    names with "_grad" behind.

    Attributes:
        run: what made it: tokens, mask, loop count, seed and initial state.
    """

    def __init__(self, cache_dict: dict[str, Tensor], model: Engine, run: Run, has_batch_dim: bool = True):
        super().__init__(cache_dict, cast(Any, model), has_batch_dim)  # TransformerLens asks for its own config
        self.run = run

    def __repr__(self) -> str:
        made = ", ".join(f"{key}={value}" for key, value in self.run.describe().items())
        return f"LoopedCache({len(self)} activations, {made})"

    def __getitem__(self, key: str | tuple[Any, ...]) -> Tensor:
        """Read one activation; see the class for the forms of `key`.

        Raises:
            HookNameError: the site is not cached, or the loop is missing from a site that fires in every loop.
        """
        site = self._site(key)
        if site.name in self.cache_dict:
            return self.cache_dict[site.name]
        cached = self._loops(site)
        if cached and site.loop is None:
            raise HookNameError(
                f"{site.name!r} fires once in every loop: say which, or take cache.stack for all. "
                f"Cached loops: {_spell(cached)}."
            )
        if cached:
            raise HookNameError(f"{site.name!r} is not cached; this site has the loops {_spell(cached)}.")
        raise HookNameError(f"{site.name!r} is not cached.{nearest(site.name, self.cache_dict)}")

    def __contains__(self, key: object) -> bool:
        if isinstance(key, str) and key in self.cache_dict:
            return True
        if not isinstance(key, (str, tuple)):
            return False
        try:
            return self._site(key).name in self.cache_dict
        except InputError:
            return False

    def _site(self, key: str | tuple[Any, ...]) -> HookSite:
        """The site that a key means, with negative layers and loops counted from the end."""
        name, *rest = (key,) if isinstance(key, str) else key
        if "hook_" in name and not rest:
            return HookSite.parse(name)
        stack, short = None, name
        for prefix in (PRELUDE, CODA):
            if name.startswith(prefix + "."):
                stack, short = prefix, name.removeprefix(prefix + ".")
        kind = rest.pop(2) if len(rest) > 2 else None
        component = _component(short, kind)
        base = component.removesuffix(_GRAD)
        if stack is None and base not in BLOCK_AXES:
            if base not in LOOP_AXES:
                if base not in MODEL_AXES:
                    raise HookNameError(f"there is no activation {name!r}.{nearest(name, _SHORT_NAMES)}")
                if rest:
                    raise HookNameError(f"{component!r} fires once in a run: read it as cache[{name!r}].")
                return HookSite(component)
            if len(rest) > 1:
                raise HookNameError(f"{component!r} belongs to no layer: read it as cache[{name!r}, loop].")
            return HookSite(component, loop=self._index("loop", rest[0], self.run.n_loops) if rest else None)
        if not rest or rest[0] is None:
            raise HookNameError(
                f"{name!r} belongs to a layer: read it as cache[{name!r}, layer{'' if stack else ', loop'}]."
            )
        layer = self._index("layer", rest[0], self._n_layers(stack or CORE))
        if stack is not None:
            if len(rest) > 1 and rest[1] is not None:
                raise HookNameError(f"the {stack} runs once: leave the loop out of {key!r}.")
            return HookSite(component, stack, layer)
        loop = self._index("loop", rest[1], self.run.n_loops) if len(rest) > 1 and rest[1] is not None else None
        return HookSite(component, CORE, layer, loop)

    def _n_layers(self, stack: str) -> int:
        return cast(Engine, self.model).schedule.n_layers(stack)

    @staticmethod
    def _index(name: str, value: object, size: int) -> int:
        try:
            return resolve_index(name, value, size)
        except InputError as error:
            raise HookNameError(str(error)) from None

    def _loops(self, site: HookSite) -> list[int]:
        n = self.run.n_loops
        return [t for t in range(n) if site.at(t).name in self.cache_dict]

    def loops(self, name: str, layer: int | None = None) -> list[int]:
        """The loops at which a site is cached, in order."""
        return self._loops(self._site((name, layer) if layer is not None else name).at(None))

    def stack(self, name: str, layer: int | None = None, layer_type: str | None = None) -> Tensor:
        """All cached loops of a site, stacked in a new first axis, [loop, ...].

        Args:
            name: short name ("pattern", "state_post") or a full one without a loop.
            layer: the core layer; None for a site of the loop itself, or for all layers, [loop, layer, ...].
            layer_type: "ln1", "ln2", ... for "scale" and "normalized".

        Raises:
            HookNameError: nothing of the site is cached, or its layers do not have the same loops.
        """
        component = _component(name, layer_type) if "." not in name else None
        if component is not None and component.removesuffix(_GRAD) in BLOCK_AXES and layer is None:
            sites = [HookSite(component, CORE, index) for index in range(self._n_layers(CORE))]
            sites = [site for site in sites if self._loops(site)]
            if len({tuple(self._loops(site)) for site in sites}) > 1:
                raise HookNameError(f"the layers of {name!r} have different loops cached: name a layer.")
            columns = [self._stack_loops(site) for site in sites]
            if not columns:
                raise HookNameError(f"{name!r} is not cached at any loop.{nearest(component, self.cache_dict)}")
            return torch.stack(columns, dim=1)
        key = name if layer is None else (name, layer, None, layer_type)
        return self._stack_loops(self._site(key).at(None))

    def _stack_loops(self, site: HookSite) -> Tensor:
        loops = self._loops(site)
        if not loops:
            raise HookNameError(f"{site.name!r} is not cached at any loop.{nearest(site.name, self.cache_dict)}")
        return torch.stack([self.cache_dict[site.at(t).name] for t in loops])

    def apply_slice_to_loops(self, loops: int | Iterable[int]) -> LoopedCache:
        """The cache of some loops only (negative numbers count from the end); sites that fire once are kept."""
        wanted = [loops] if isinstance(loops, int) else list(loops)
        chosen = {self._index("loop", loop, self.run.n_loops) for loop in wanted}
        kept = {}
        for name, tensor in self.cache_dict.items():
            loop = HookSite.parse(name).loop
            if loop is None or loop in chosen:
                kept[name] = tensor
        return LoopedCache(kept, self.model, self.run, self.has_batch_dim)

    def apply_slice_to_batch_dim(self, batch_slice: Any) -> LoopedCache:
        """The cache of some rows of the batch, as in TransformerLens."""
        sliced = super().apply_slice_to_batch_dim(batch_slice)
        return LoopedCache(sliced.cache_dict, self.model, self.run, sliced.has_batch_dim)

    def _refuse(self, what: str) -> NoReturn:
        raise InputError(
            f"{what} adds up a feedforward model's residual stream. In a looped model injection and "
            "the norms between loops are not part of that sum, so it would be wrong here: read states with "
            "cache.stack, or use model.unrolled(n_loops), whose cache adds up where that holds."
        )

    def accumulated_resid(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Refused: the sum over layers does not hold across loops."""
        self._refuse("accumulated_resid")

    def decompose_resid(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Refused: the sum over layers does not hold across loops."""
        self._refuse("decompose_resid")

    def get_full_resid_decomposition(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Refused: the sum over layers does not hold across loops."""
        self._refuse("get_full_resid_decomposition")

    def stack_head_results(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Refused: the sum over layers does not hold across loops."""
        self._refuse("stack_head_results")

    def stack_neuron_results(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Refused: the sum over layers does not hold across loops."""
        self._refuse("stack_neuron_results")

    def stack_activation(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Refused, as it would mix loops: use `stack`."""
        self._refuse("stack_activation")

    def apply_ln_to_stack(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Refused: it scales parts of that sum."""
        self._refuse("apply_ln_to_stack")

    def compute_head_results(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Refused: it looks for one loop only; cache "attn.hook_result" by name instead."""
        self._refuse("compute_head_results")

    def get_neuron_results(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Refused: it makes parts of that sum."""
        self._refuse("get_neuron_results")

    def logit_attrs(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Refused: it splits a logit into parts of that sum."""
        self._refuse("logit_attrs")

    def logit_lens(self, **kwargs: Any) -> NoReturn:
        """Refused: it reads layers without their loops."""
        self._refuse("logit_lens")


@dataclass(frozen=True)
class Keep:
    """What a run keeps; `LoopedModel.run_with_cache` says what each is."""

    names_filter: NamesFilter = None
    loops: Iterable[int] | None = None
    pos_slice: Any = None
    device: torch.device | str | None = None
    incl_bwd: bool = False
    remove_batch_dim: bool = False


def run_with_cache(
    engine: Engine, run: Run, keep: Keep, return_type: ReturnType = "logits", loss_per_token: bool = False
) -> tuple[Any, LoopedCache]:
    """Execute a run and keep activations; see `LoopedModel.run_with_cache`."""
    if keep.incl_bwd and (return_type != "loss" or loss_per_token or not run.reads_out):
        raise InputError("incl_bwd runs backward from the mean loss: pass return_type='loss' and no stop_at_loop.")
    check_return(run, return_type, loss_per_token)
    if keep.remove_batch_dim and run.tokens.shape[0] != 1:
        raise InputError(f"remove_batch_dim needs a batch of one, got {run.tokens.shape[0]} prompts.")
    chosen = engine.reach(run).select(keep.names_filter, keep.loops)
    store: dict[str, Tensor] = {}
    writer = CacheWriter(store, keep.device, Slice.unwrap(keep.pos_slice), keep.remove_batch_dim)
    with engine.hooks():
        for point, where in chosen:
            point.add_hook(writer.save, level=engine.context_level, where=where, reads_only=True)
            if keep.incl_bwd:
                point.add_hook(writer.save_grad, "bwd", level=engine.context_level, where=where)
        output = engine.execute(run, return_type, loss_per_token)
        if keep.incl_bwd:
            output.backward()
    return output, LoopedCache(store, engine, run, has_batch_dim=not keep.remove_batch_dim)


def _component(short: str, layer_type: str | None) -> str:
    """TransformerLens's component of a short name: "z" -> "attn.hook_z", ("scale", "ln1") -> "ln1.hook_scale"."""
    if "hook_" in short:
        return short
    grad = _GRAD if short.endswith(_GRAD) else ""
    base = short.removesuffix(_GRAD)
    if f"hook_{base}" in LOOP_AXES or f"hook_{base}" in MODEL_AXES:
        return f"hook_{base}{grad}"
    return get_act_name(base, 0, layer_type).removeprefix("blocks.0.") + grad


def _spell(loops: list[int]) -> str:
    """0, 1, 2, 3 as text, with long runs shortened."""
    if len(loops) > 6 and loops == list(range(loops[0], loops[-1] + 1)):
        return f"{loops[0]} to {loops[-1]}"
    return ", ".join(map(str, loops))
