"""Loop-indexed hook points, on TransformerLens's `HookPoint`.

A looped model has one `SharedHookPoint` at each physical site: 48 layers run 128 times have 48 points at a site, not
6,144. It is called with the loop that is running and hands a hook a light `LoopHookPoint`, whose name, loop and layer
are those of that very call. A hook may be registered for one loop, for every loop, or for the names that a function
accepts.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle
from transformer_lens.hook_points import HookPoint, LensHandle

from tl_looped.engine.errors import HookNameError, InputError, nearest
from tl_looped.engine.schedule import HookSite

Direction = Literal["fwd", "bwd"]
HookFn = Callable[..., Any]
HookName = str | Callable[[str], bool]
# At which loops a hook acts: None for every loop, an index, some indices, or a function on the name with the loop in
# it.
Where = int | frozenset[int] | Callable[[str], bool] | None


class Progress:
    """How many positions of the rows came before those that are running: what all hook points of a model share."""

    def __init__(self) -> None:
        self.first_position = 0

    @contextmanager
    def at(self, first_position: int) -> Iterator[None]:
        """For the length of a `with` block, what runs begins at this position."""
        before, self.first_position = self.first_position, first_position
        try:
            yield
        finally:
            self.first_position = before


class LoopHookPoint:
    """One site at one loop: what a hook function receives as `hook`.

    Attributes:
        point: the shared point at this site.
        loop: the loop, from 0; None for a site that fires once in a run.
        first_position: where in the rows, padding included, the first position of the hook's tensor is (the first
            query, for patterns; their keys begin at 0). It is 0, except while text is generated with a key-value
            cache: there a tensor holds only the positions that are new.
    """

    __slots__ = ("first_position", "loop", "point")

    def __init__(self, point: SharedHookPoint, loop: int | None):
        self.point = point
        self.loop = loop
        self.first_position = point.progress.first_position

    @property
    def site(self) -> HookSite:
        """Stack, layer, loop and component."""
        return self.point.site.at(self.loop)

    @property
    def name(self) -> str:
        """The name with the loop in it, e.g. "blocks.2.loop.3.attn.hook_z"."""
        return self.site.name

    @property
    def ctx(self) -> dict[Any, Any]:
        """TransformerLens's scratch dictionary, shared by all loops of the site."""
        return self.point.ctx

    def layer(self) -> int:
        """Index of the layer in its stack."""
        if self.site.layer is None:
            raise HookNameError(f"{self.name!r} belongs to no layer.")
        return self.site.layer

    def add_hook(
        self,
        hook: HookFn,
        dir: Direction = "fwd",
        is_permanent: bool = False,
        level: int | None = None,
        prepend: bool = False,
    ) -> LensHandle:
        """Register a hook that acts at this loop only."""
        return self.point.add_hook(hook, dir, is_permanent, level, prepend, where=self.loop)

    def __repr__(self) -> str:
        return f"LoopHookPoint({self.name!r})"


@dataclass
class LoopHandle(LensHandle):
    """TransformerLens's record of a registered hook, with the loops at which it acts."""

    fn: HookFn = lambda tensor, hook: None
    where: Where = None
    reads_only: bool = False
    _matched: dict[int | None, bool] = field(default_factory=dict, repr=False)

    def acts_at(self, site: HookSite) -> bool:
        """Whether the hook acts at this site's loop."""
        if self.where is None or isinstance(self.where, int):
            return self.where is None or self.where == site.loop
        if isinstance(self.where, frozenset):
            return site.loop in self.where
        if site.loop not in self._matched:
            self._matched[site.loop] = bool(self.where(site.name))
        return self._matched[site.loop]


class SharedHookPoint(HookPoint):
    """The hook point at one physical site, shared by all loops: `x = point(x, loop)`.

    Without hooks it returns `x` and costs a function call. A forward hook `fn(x, hook=LoopHookPoint)` may return a
    tensor of the same shape and dtype, which takes the place of `x`. A backward hook `fn(grad, hook=LoopHookPoint)` is
    bound to the activation of the loop it saw in the forward, so a gradient is never paired with another loop; it
    belongs to that forward's graph, and acts when the graph is run backward, also after the hook left the model.

    Args:
        site: the site without a loop.
        looped: whether it fires once in every loop.
        progress: which positions are running, shared by the points of a model.
    """

    def __init__(self, site: HookSite, looped: bool, progress: Progress):
        super().__init__()
        self.site = site
        self.looped = looped
        self.progress = progress
        self.name: str = site.name  # pyright: ignore[reportIncompatibleVariableOverride] - never None here
        self._registered: OrderedDict[int, HookFn] = OrderedDict()

    def add_hook(
        self,
        hook: HookFn,
        dir: Direction = "fwd",
        is_permanent: bool = False,
        level: int | None = None,
        prepend: bool = False,
        alias_names: list[str] | None = None,
        where: Where = None,
        reads_only: bool = False,
    ) -> LensHandle:
        """Register a hook, as TransformerLens's `HookPoint.add_hook`.

        Args:
            hook: `fn(tensor, hook=LoopHookPoint)`.
            dir: "fwd" for activations, "bwd" for their gradients.
            is_permanent: whether `remove_hooks` leaves it unless told otherwise.
            level: TransformerLens's nesting level of contexts.
            prepend: before the hooks that are there, not after.
            alias_names: must be None.
            where: the loops at which it acts.
            reads_only: the hook promises not to change its tensor, which saves a copy.
        """
        if dir not in ("fwd", "bwd"):
            raise InputError(f"a hook's direction must be 'fwd' or 'bwd', got {dir!r}.")
        if alias_names is not None:
            raise InputError("alias_names is not supported: every loop of a site has one name.")
        removable = RemovableHandle(self._registered)
        self._registered[removable.id] = hook
        handle = LoopHandle(removable, is_permanent, level, hook, fn=hook, where=where, reads_only=reads_only)
        handles = self.fwd_hooks if dir == "fwd" else self.bwd_hooks
        handles.insert(0 if prepend else len(handles), handle)
        return handle

    def __call__(self, x: Tensor, loop: int | None = None) -> Tensor:
        """The activation after this loop's hooks."""
        if not (self.fwd_hooks or self.bwd_hooks):
            return x
        return self._run(x, loop)[0]

    def _acting(self, handles: Iterable[LensHandle], site: HookSite) -> list[LoopHandle]:
        return [
            handle
            for handle in handles
            if isinstance(handle, LoopHandle) and handle.hook.id in self._registered and handle.acts_at(site)
        ]

    def handles(self) -> list[LoopHandle]:
        """The registered hooks, forward and backward."""
        return [handle for handle in (*self.fwd_hooks, *self.bwd_hooks) if isinstance(handle, LoopHandle)]

    def wants(self, loop: int | None = None) -> bool:
        """Whether any hook acts at this loop: what is not asked for need not be computed."""
        if not (self.fwd_hooks or self.bwd_hooks):
            return False
        return bool(self._acting([*self.fwd_hooks, *self.bwd_hooks], self.site.at(loop)))

    def fire(self, x: Tensor, loop: int | None = None) -> tuple[Tensor, bool]:
        """Run the hooks of this loop on `x`; return what to go on with, and whether a hook changed its numbers.

        A hook that puts the same numbers in place, as patching a run into itself does, changes nothing.
        """
        final, touched = self._run(x, loop)
        return final, touched and not torch.equal(final, x)

    def _run(self, x: Tensor, loop: int | None) -> tuple[Tensor, bool]:
        """The activation after its hooks, and whether one of them wrote to it or gave another.

        A hook that may write gets a copy: the tensor itself may be the caller's initial state, the prelude's output
        that every loop reads again, or in a cache, and none of these is to change when a hook edits in place.
        """
        here = LoopHookPoint(self, loop)
        acting = self._acting(self.fwd_hooks, here.site)
        final = shown = x if all(handle.reads_only for handle in acting) else x.clone()
        for handle in acting:
            result = handle.fn(final, hook=here)
            if result is not None:
                final = _checked(result, x, here.name)
        written = shown is not x and (shown.is_inference() or shown._version > 0)  # inference tensors have no version
        touched = final is not shown or written
        backward = self._acting(self.bwd_hooks, here.site)
        if backward and final.requires_grad:
            final = final.view_as(final)  # a node of its own, as one tensor may pass through several sites
            final.register_hook(partial(_run_backward, [handle.fn for handle in backward], here))
        return final, touched

    def forward(self, x: Tensor, loop: int | None = None) -> Tensor:
        """The same as calling the point."""
        return self(x, loop)


def _checked(result: object, x: Tensor, name: str) -> Tensor:
    if not isinstance(result, Tensor):
        raise InputError(
            f"the hook on {name!r} returned {type(result).__name__}; return a tensor, or None for no change."
        )
    if result.shape != x.shape or result.dtype != x.dtype:
        raise InputError(
            f"the hook on {name!r} returned shape {tuple(result.shape)} {result.dtype}, but the activation has shape "
            f"{tuple(x.shape)} {x.dtype}: return a tensor like it."
        )
    return result


def _run_backward(hooks: list[HookFn], here: LoopHookPoint, grad: Tensor) -> Tensor | None:
    changed = None
    for hook in hooks:
        result = hook(grad, hook=here)
        if isinstance(result, tuple):
            (result,) = result
        if result is not None:
            grad = changed = _checked(result, grad, f"{here.name} (gradient)")
    return changed


class HookDict(dict[str, HookPoint]):
    """All physical hook points by name; an indexed name gives the point at that loop, made when asked for.

    Attributes:
        progress: which positions are running.
    """

    def __init__(self) -> None:
        super().__init__()
        self.progress = Progress()

    def __missing__(self, name: str) -> LoopHookPoint:
        return LoopHookPoint(self.shared(name), HookSite.parse(name).loop)

    def points(self) -> list[SharedHookPoint]:
        """The points, module by module; the order in which they fire within a layer is `schedule.BLOCK_AXES`'s."""
        return [point for point in self.values() if isinstance(point, SharedHookPoint)]

    def shared(self, name: str) -> SharedHookPoint:
        """The physical point of a name, with or without a loop in it.

        Raises:
            HookNameError: when the model has no such site.
        """
        site = HookSite.parse(name)
        physical = site.at(None).name
        point = self.get(physical)
        if not isinstance(point, SharedHookPoint):
            shown = nearest(physical, self)
            raise HookNameError(f"this model has no hook point {name!r}.{shown} model.hook_dict lists all of them.")
        if site.loop is not None and not point.looped:
            raise HookNameError(f"{physical!r} fires once in a run, not in every loop: leave the loop out of {name!r}.")
        return point


class HookGroup:
    """The hook points of one module, as attributes: `group.hook_q(q, loop)`.

    Not a module itself: `nn.Module` finds its submodules through a slow look-up, which 20 hook points a layer would
    feel.

    Args:
        registry: the model's hook points by name; the new ones are added.
        site: stack and layer of the group; its component is the prefix of theirs ("attn." for "attn.hook_q").
        looped: whether they fire once in every loop.
        names: "hook_q", "hook_k", ...
    """

    def __init__(self, registry: HookDict, site: HookSite, looped: bool, names: Iterable[str]):
        for name in names:
            point = SharedHookPoint(HookSite(site.component + name, site.stack, site.layer), looped, registry.progress)
            registry[point.name] = point
            setattr(self, name, point)

    if TYPE_CHECKING:

        def __getattr__(self, name: str) -> SharedHookPoint: ...


def same_value(value: Tensor, through: Tensor) -> Tensor:
    """`value`'s numbers, to the bit, with the gradient of `through`.

    Lets a hook see a quantity that the fast path does not form, such as an attention pattern, without changing the
    output.
    """
    if not through.requires_grad:
        return value.detach()
    return value.detach() + (through - through.detach())
