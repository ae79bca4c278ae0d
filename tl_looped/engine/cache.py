"""LoopedCache: TransformerLens's ActivationCache with a loop axis."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NoReturn, cast

import pandas as pd
import plotly.graph_objects as go
import torch
from safetensors.torch import save as to_safetensors
from torch import Tensor
from transformer_lens import ActivationCache
from transformer_lens.utilities.slice import Slice

from tl_looped.engine.config import LoopedConfig
from tl_looped.engine.ends import ReturnType, check_return
from tl_looped.engine.engine import Engine
from tl_looped.engine.errors import HookNameError, InputError, nearest, resolve_index
from tl_looped.engine.files import read_safetensors, write_whole
from tl_looped.engine.hooks import HookFn, HookName, LoopHookPoint
from tl_looped.engine.numbers import wide
from tl_looped.engine.reach import HEAVY, NamesFilter
from tl_looped.engine.results import AnyResult
from tl_looped.engine.runs import Run
from tl_looped.engine.schedule import DEAD_ENDS, GRAD, HookSite, find_site

_FORMAT = "tl_looped.cache"
_PLACE = ("component", "stack", "layer", "loop")


class CacheWriter:
    """The hook that stores activations (or gradients) under the name that has the loop in it.

    What is stored shares no memory with anything else: one tensor may pass several sites, the prelude's output comes in
    every loop, and the first state may be the caller's own. It is copied where that is so, and else kept as it is.

    Args:
        store: where they go.
        device: where to keep them; None for where they are.
        pos_slice: TransformerLens's slice of positions (of queries, for patterns and scores).
        remove_batch_dim: drop a batch axis of size one.
        others: tensors that are someone's already; None where other hooks may keep any, so that all is copied.
    """

    def __init__(
        self,
        store: dict[str, Tensor],
        device: torch.device | str | None,
        pos_slice: Slice,
        remove_batch_dim: bool,
        others: Iterable[Tensor] | None = None,
    ):
        self.store = store
        self.device = device
        self.pos_slice = pos_slice
        self.remove_batch_dim = remove_batch_dim
        self._taken = None if others is None else {one.untyped_storage().data_ptr() for one in others}

    def save(self, tensor: Tensor, hook: LoopHookPoint) -> None:
        """A forward hook."""
        self._put(tensor, hook.site)

    def save_grad(self, grad: Tensor, hook: LoopHookPoint) -> None:
        """A backward hook."""
        self._put(grad, hook.site, GRAD)

    def _put(self, tensor: Tensor, site: HookSite, suffix: str = "") -> None:
        kept = tensor.detach()
        if self.pos_slice.mode != "identity":
            kept = self.pos_slice.apply(kept, dim=site.pos_axis)
        if self.remove_batch_dim:
            kept = kept.squeeze(0)
        kept = kept.to(self.device)
        memory = kept.untyped_storage()
        part = memory.nbytes() != kept.numel() * kept.element_size()  # of something larger, which it would hold
        if part or self._taken is None or memory.data_ptr() in self._taken:
            kept = kept.clone()
        else:
            self._taken.add(memory.data_ptr())
        self.store[site.name + suffix] = kept


class LoopedCache(AnyResult, ActivationCache):
    """Activations of one run, by site and loop.

    =========================================  =================================================================
    cache["resid_post", layer, loop]           a core layer in one loop; negative numbers count from the end
    cache["scale", layer, loop, "ln1"]         a norm's site, named as in TransformerLens
    cache["state_post", loop]                  a site of the loop itself
    cache["prelude.resid_post", layer]         a layer that runs once; also "coda.…"
    cache["coda.scale", layer, None, "ln1"]    a norm's site in it
    cache["embed"]                             a site that fires once
    cache["blocks.2.loop.3.attn.hook_z"]       any full name
    cache.stack("pattern", layer)              all loops, [loop, ...]
    cache.stack("resid_post")                  all loops and core layers, [loop, layer, ...]
    cache["L_blocks.resid_post", layer, loop]  where two stacks loop: one must be named; loops are that stack's own
    =========================================  =================================================================

    Reading a site of a loop without saying which raises, and names the loops that are cached. Gradients have the same
    names with "_grad" behind. Every activation is its own: editing one changes no other, and nothing of the caller's.

    Attributes:
        run: what made it: tokens, mask, loop count, seed and initial state.
        cfg: the model's config.
        kept_loops: the loops of the run that it is of, in order: those that ran, or those asked for (`loops=` of
            `run_with_cache`, `apply_slice_to_loops`). Of a stack that runs several times in a loop, all of these.
        notes: what else made it, as plain values; kept in its file.
    """

    def __init__(
        self,
        cache_dict: dict[str, Tensor],
        model: Engine,
        run: Run,
        has_batch_dim: bool = True,
        loops: Iterable[int] | None = None,
    ):
        super().__init__(cache_dict, cast(Any, model), has_batch_dim)  # TransformerLens asks for its own config
        self.run = run
        self.cfg: LoopedConfig = model.cfg
        self.schedule = model.cfg.schedule(run.counts)
        kept = range(run.start, run.stop) if loops is None else {resolve_index("loop", t, run.n_loops) for t in loops}
        self.kept_loops = tuple(sorted(kept))
        self.notes: dict[str, Any] = {}

    def _with(self, cache_dict: dict[str, Tensor], **changes: Any) -> LoopedCache:
        other = type(self).__new__(type(self))
        other.__dict__.update({**self.__dict__, "cache_dict": cache_dict, **changes})
        return other

    def __copy__(self) -> LoopedCache:
        return self._with(dict(self.cache_dict))

    def __deepcopy__(self, memo: dict[int, Any]) -> LoopedCache:
        return self._with({name: tensor.clone() for name, tensor in self.cache_dict.items()})

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "model": None}  # a pickle takes no model along; reading does not need it

    @property
    def made_by(self) -> dict[str, Any]:  # pyright: ignore[reportIncompatibleVariableOverride] - told by the run
        """Model, loop count and initial state."""
        return {"model": self.cfg.model_name, **self.run.describe(), **self.notes}

    def _contents(self) -> dict[str, Any]:
        return self.cache_dict

    def to_dataframe(self) -> pd.DataFrame:
        """One row for each activation: name, component, stack, layer, loop, shape, and its root mean square."""
        rows = []
        for name, tensor in self.cache_dict.items():
            site = HookSite.parse(name)
            place = {one: getattr(site, one) for one in _PLACE}
            rms = float(wide(tensor).square().mean().sqrt()) if tensor.is_floating_point() else float("nan")
            rows.append({"name": name, **place, "shape": tuple(tensor.shape), "rms": rms})
        table = pd.DataFrame(rows, columns=["name", *_PLACE, "shape", "rms"])
        return table.astype({"layer": "Int64", "loop": "Int64"})

    def plot(self, name: str = "resid_post") -> go.Figure:
        """The root mean square of a site's activations over loops, a line for each core layer.

        Args:
            name: of a site that loops, short or in full, such as "attn_out" or "state_post".

        Raises:
            HookNameError: it is not cached at any loop.
        """
        table, site = self.to_dataframe(), self.cfg.own_site(find_site(name))
        table = table.query(f"component == {site.component!r} and loop.notna()").sort_values("loop")
        table = table if site.stack is None else table[table["stack"] == site.stack]
        if table.empty:
            raise HookNameError(f"{name!r} is not cached at any loop, so there is nothing to draw over loops.")
        by_layer = None if table.layer.isna().all() else "layer"
        title = f"Root mean square of {name}: {self.cfg.model_name}"
        return table.plot(x="loop", y="rms", color=by_layer, markers=True, title=title, backend="plotly")

    def save(self, path: str | Path) -> Path:
        """Write activations and run to one safetensors file, without the model; `load` reads it.

        Raises:
            InputError: the file can't be written.
        """
        run = {field.name: getattr(self.run, field.name) for field in dataclasses.fields(self.run)}
        parts = {f"run.{name}": value for name, value in run.items() if isinstance(value, Tensor)}
        content = {
            "run": {name: None if isinstance(value, Tensor) else value for name, value in run.items()},
            "cfg": self.cfg.to_dict(),
            "notes": self.notes,
            "loops": self.kept_loops,
            "has_batch_dim": self.has_batch_dim,
        }
        tensors = {name: one.detach().cpu().contiguous().clone() for name, one in {**self.cache_dict, **parts}.items()}
        return write_whole(path, to_safetensors(tensors, {"format": _FORMAT, "content": json.dumps(content)}))

    @classmethod
    def load(  # pyright: ignore[reportIncompatibleMethodOverride] - a cache needs its model
        cls, path: str | Path, model: Engine, device: torch.device | str = "cpu"
    ) -> LoopedCache:
        """Read what `save` wrote.

        Args:
            path: the file.
            model: the model that made it, or one of the same config.
            device: where to put the activations.

        Raises:
            InputError: no such file, not a cache of tl_looped, or of a model of another kind or config.
        """
        if not isinstance(model, Engine):
            raise InputError(f"a cache is loaded for the LoopedModel that made it, got {type(model).__name__}.")
        header, tensors = read_safetensors(path, _FORMAT, "a cache", device)
        content = json.loads(header["content"])
        cfg = LoopedConfig.from_dict({**content["cfg"], "model_name": model.cfg.model_name})  # names may be folders
        if cfg != model.cfg:
            other = [name for name, value in cfg.to_dict().items() if value != model.cfg.to_dict()[name]]
            raise InputError(
                f"{str(path)!r} was cached from {content['cfg']['model_name']!r}, which differs from this model in "
                f"{', '.join(other)}: pass the model that made it."
            )
        run = {name: tensors.pop(f"run.{name}", value) for name, value in content["run"].items()}
        made_by: Any = run | {"step_sizes": run.get("step_sizes") and tuple(run["step_sizes"])}
        cache = cls(tensors, model, Run(**made_by), content["has_batch_dim"], content["loops"])
        return cache._with(tensors, notes=content.get("notes", {}))

    def __repr__(self) -> str:
        return f"LoopedCache({len(self)} activations, {', '.join(f'{k}={v}' for k, v in self.run.describe().items())})"

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
        if not isinstance(name, str) or len(rest) > 3:
            raise HookNameError(f"{key!r} is no key: read as cache[name, layer, loop], see LoopedCache.")
        if len(rest) == 2 and isinstance(rest[1], str):
            raise HookNameError(f"{key!r}: the third is the loop: cache[{name!r}, layer, loop, {rest[1]!r}].")
        site = self.cfg.own_site(find_site(name, rest.pop(2) if len(rest) > 2 else None))
        if site.layer is not None or site.loop is not None:
            if rest:
                raise HookNameError(f"{name!r} says its place itself: read it as cache[{name!r}].")
            return site
        layer, loop = (*rest, None, None)[:2]
        if not site.in_layer:
            if not site.looped and rest:
                raise HookNameError(f"{site.component!r} fires once in a run: read it as cache[{name!r}].")
            if len(rest) > 1:
                raise HookNameError(f"{site.component!r} belongs to no layer: read it as cache[{name!r}, loop].")
            return site if layer is None else site.at(self._index("loop", layer, self.schedule.n_loops(site.stack)))
        if layer is None:
            raise HookNameError(
                f"{name!r} belongs to a layer: read it as cache[{name!r}, layer{', loop' if site.looped else ''}]."
            )
        if not site.looped and loop is not None:
            raise HookNameError(f"the {site.stack} runs once: leave the loop out of {key!r}.")
        site = dataclasses.replace(site, layer=self._index("layer", layer, self.schedule.n_layers(site.stack or "")))
        return site if loop is None else site.at(self._index("loop", loop, self.schedule.n_loops(site.stack)))

    @staticmethod
    def _index(name: str, value: object, size: int) -> int:
        try:
            return resolve_index(name, value, size)
        except InputError as error:
            raise HookNameError(str(error)) from None

    def _loops(self, site: HookSite) -> list[int]:
        return [t for t in range(self.schedule.n_loops(site.stack)) if site.at(t).name in self.cache_dict]

    def loops(self, name: str, layer: int | None = None) -> list[int]:
        """The loops at which a site is cached, in order."""
        return self._loops(self._site((name, layer) if layer is not None else name).at(None))

    def stack(
        self,
        name: str,
        layer: int | Sequence[int] | None = None,
        layer_type: str | None = None,
        loops: Iterable[int] | None = None,
    ) -> Tensor:
        """A site's loops, stacked in a new first axis, [loop, ...]: all `kept_loops`, in order, or it raises.

        Args:
            name: short name ("pattern", "state_post") or a full one without a loop.
            layer: the core layer; several, or None for all of them, [loop, layer, ...]. None also for a site of the
                loop itself.
            layer_type: "ln1", "ln2", ... for "scale" and "normalized".
            loops: some loops instead, in this order; negative numbers count from the end.

        Raises:
            HookNameError: a loop or a layer of it is not cached, or no gradient reached it.
        """
        site = self.cfg.own_site(find_site(name, layer_type))
        if not site.looped:
            raise HookNameError(f"{site.component!r} fires once in a run, so it has no loops: read it as cache[name].")
        chosen = self.schedule.loops_in(site.stack, self.kept_loops)
        chosen = chosen if loops is None else [self._index("loop", t, self.schedule.n_loops(site.stack)) for t in loops]
        if not site.in_layer or site.layer is not None or isinstance(layer, int):
            key = name if layer is None else (name, layer, None, layer_type)
            return self._stack_loops(self._site(key).at(None), chosen)
        layers = range(self.schedule.n_layers(site.stack or "")) if layer is None else layer
        sites = [self._site((name, one, None, layer_type)) for one in layers]
        if not any(map(self._loops, sites)):
            raise HookNameError(f"{name!r} is not cached at any loop.{nearest(site.component, self.cache_dict)}")
        return torch.stack([self._stack_loops(one, chosen) for one in sites], dim=1)

    def _stack_loops(self, site: HookSite, loops: Sequence[int]) -> Tensor:
        cached = self._loops(site)
        if not cached:
            raise HookNameError(f"{site.name!r} is not cached at any loop.{nearest(site.name, self.cache_dict)}")
        if missing := [t for t in loops if t not in cached]:
            why = "; no gradient came there" if site.component.endswith(GRAD) else ""
            raise HookNameError(
                f"{site.name!r} is cached at the loops {_spell(cached)}, not at {_spell(missing)}{why}. A stack has "
                f"all loops of the run or those of loops=: pass stack(..., loops={cached}) for the ones that are there."
            )
        return torch.stack([self.cache_dict[site.at(t).name] for t in loops])

    def apply_slice_to_loops(self, loops: int | Iterable[int]) -> LoopedCache:
        """The cache of some loops only, sharing its tensors; sites that fire once are kept.

        Args:
            loops: one or several; negative numbers count from the end.
        """
        wanted = [loops] if isinstance(loops, int) else list(loops)
        chosen = {self._index("loop", loop, self.run.n_loops) for loop in wanted}
        sites = {name: HookSite.parse(name) for name in self.cache_dict}
        of_loops = {name: self.schedule.loops_in(site.stack, chosen) for name, site in sites.items()}
        kept = {n: x for n, x in self.cache_dict.items() if sites[n].loop is None or sites[n].loop in of_loops[n]}
        return self._with(kept, kept_loops=tuple(sorted(chosen)))

    def apply_slice_to_batch_dim(self, batch_slice: Any) -> LoopedCache:
        """The cache of some rows of the batch, as in TransformerLens; a slice shares its tensors."""
        sliced = super().apply_slice_to_batch_dim(batch_slice)
        return self._with(sliced.cache_dict, has_batch_dim=sliced.has_batch_dim)

    def _refuse(self, what: str) -> NoReturn:
        raise InputError(
            f"{what} adds up a feedforward model's residual stream. In a looped model injection and "
            "the norms between loops are not part of that sum, so it would be wrong here: read states with "
            "cache.stack, split logits by lens.decompose, or take model.unrolled(n_loops), where that sum may hold."
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


@dataclasses.dataclass(frozen=True)
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
        raise InputError(f"incl_bwd runs backward from the mean loss: pass return_type='loss' and no {run.stops_by}.")
    check_return(engine.cfg, run, return_type, loss_per_token)
    if keep.remove_batch_dim and run.tokens.shape[0] != 1:
        raise InputError(f"remove_batch_dim needs a batch of one, got {run.tokens.shape[0]} prompts.")
    loops = None if keep.loops is None else list(keep.loops)
    chosen = engine.reach(run).select(keep.names_filter, loops)
    store: dict[str, Tensor] = {}
    alone = not any(point.handles() for point in engine.hook_dict.points())
    others = [one for one in (run.state,) if one is not None] if alone else None
    writer = CacheWriter(store, keep.device, Slice.unwrap(keep.pos_slice), keep.remove_batch_dim, others)
    with engine.hooks():
        for point, where in chosen:
            point.add_hook(writer.save, level=engine.context_level, where=where, reads_only=True)
            if keep.incl_bwd and point.site.component not in DEAD_ENDS:
                point.add_hook(writer.save_grad, "bwd", level=engine.context_level, where=where)
        output = engine.execute(run, return_type, loss_per_token)
        if keep.incl_bwd:
            output.backward()
    return output, LoopedCache(store, engine, run, not keep.remove_batch_dim, loops)


class CachingHooks:
    """TransformerLens's calls that keep activations of runs to come, under names that say the loop or the depth.

    For a model that has `add_hook`. Those of TransformerLens register for names without loops, and store under them.
    """

    is_caching: bool
    add_hook: Callable[..., None]

    def get_caching_hooks(
        self,
        names_filter: NamesFilter = None,
        incl_bwd: bool = False,
        device: torch.device | str | None = None,
        remove_batch_dim: bool = False,
        cache: dict[str, Tensor] | None = None,
        pos_slice: Any = None,
    ) -> tuple[dict[str, Tensor], list[tuple[HookName, HookFn]], list[tuple[HookName, HookFn]]]:
        """Hooks for `hooks` or `run_with_hooks`; arguments as in `run_with_cache`.

        Returns:
            The dictionary that they fill; the forward hooks; the backward hooks.
        """
        store = {} if cache is None else cache
        writer = CacheWriter(store, device, Slice.unwrap(pos_slice), remove_batch_dim)
        chosen = (lambda name: not name.endswith(HEAVY)) if names_filter is None else names_filter
        names: list[HookName] = [chosen] if isinstance(chosen, str) or callable(chosen) else [*chosen]
        backward = [(name, writer.save_grad) for name in names] if incl_bwd else []
        return store, [(name, writer.save) for name in names], backward

    def add_caching_hooks(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Register `get_caching_hooks` until `reset_hooks`; returns the dictionary that they fill."""
        store, forward, backward = self.get_caching_hooks(*args, **kwargs)
        for direction, hooks in (("fwd", forward), ("bwd", backward)):
            for name, hook in hooks:
                self.add_hook(name, hook, direction)
        self.is_caching = True
        return store


def _spell(loops: list[int]) -> str:
    """0, 1, 2, 3 as text, with long runs shortened."""
    if len(loops) > 6 and loops == list(range(loops[0], loops[-1] + 1)):
        return f"{loops[0]} to {loops[-1]}"
    return ", ".join(map(str, loops))
