"""Loop-indexed hook points, on TransformerLens's `HookPoint`.

A looped model has one `SharedHookPoint` at each physical site: 48 layers run 128 times have 48 points at a site, not
6,144. It is called with the loop that is running and hands a hook a light `LoopHookPoint`, whose name, loop and layer
are those of that very call. A hook may be registered for one loop, for every loop, or for the names that a function
accepts.

Threads may run one model at the same time. A hook of a run (`run_with_hooks`, `run_with_cache`, `with model.hooks`)
belongs to the thread that registered it and acts in that thread's runs alone; one of `model.add_hook` acts in all.
"""

from __future__ import annotations

import itertools
import threading
from collections import OrderedDict
from collections.abc import Callable, Container, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformer_lens.hook_points import HookPoint, LensHandle

from tl_looped.engine.errors import HookNameError, InputError, nearest
from tl_looped.engine.schedule import CORE, HookSite, points_under

Direction = Literal["fwd", "bwd"]
HookFn = Callable[..., Any]
HookName = str | Callable[[str], bool]
# At which loops a hook acts: None for every loop, an index, some indices, or a function on the name with the loop in
# it.
Where = int | frozenset[int] | Callable[[str], bool] | None


_numbers = itertools.count()
_registering = threading.Lock()  # the lists of hooks are replaced, never changed, so only their writers need it


class _Thread(threading.local):
    """The thread that is running; its number is no other thread's, also after it ended."""

    def __init__(self) -> None:
        self.number = next(_numbers)


_here = _Thread()


class Progress(threading.local):
    """Where this thread is: what all hook points of a model share.

    Attributes:
        first_position: how many positions of the rows came before those that are running.
        level: how many `with model.hooks` blocks it is in.
    """

    def __init__(self) -> None:
        self.first_position = 0
        self.level = 0

    def __reduce__(self) -> tuple[type[Progress], tuple[()]]:
        return Progress, ()  # a copy of a model is nowhere yet

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
        return self.point.at(self.loop)

    @property
    def name(self) -> str:
        """The name with the loop in it, e.g. "blocks.2.loop.3.attn.hook_z"."""
        return self.site.name

    @property
    def ctx(self) -> dict[Any, Any]:
        """TransformerLens's scratch dictionary, one for each loop; `model.clear_contexts` empties all."""
        return self.point.ctx.setdefault(self.loop, {}) if self.point.looped else self.point.ctx

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
    """TransformerLens's record of a registered hook, with the loops at which it acts, and the thread (None: all)."""

    fn: HookFn = lambda tensor, hook: None
    where: Where = None
    reads_only: bool = False
    thread: int | None = None
    _matched: dict[int | None, bool] = field(default_factory=dict, repr=False)

    @property
    def here(self) -> bool:
        """Whether the hook acts in this thread's runs."""
        return self.thread is None or self.thread == _here.number

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
    tensor of the same shape and dtype, which takes the place of `x`, or write into `x`, in any way. A backward hook
    `fn(grad, hook=LoopHookPoint)` is bound to the activation of the loop it saw in the forward, so a gradient is never
    paired with another loop; it belongs to that forward's graph, and acts when the graph is run backward, also after
    the hook left the model. Where the activation has no gradient by itself (a drawn state, frozen weights), a backward
    hook gives it one.

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
        self._sites: dict[int | None, HookSite] = {None: site}

    def at(self, loop: int | None) -> HookSite:
        """The site in a loop, made once: names are asked for at every firing."""
        found = self._sites.get(loop)
        if found is None:
            found = self._sites[loop] = self.site.at(loop)
        return found

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
            level: TransformerLens's nesting level of contexts; with one, the hook belongs to this thread.
            prepend: before the hooks that are there, not after.
            alias_names: must be None.
            where: the loops at which it acts.
            reads_only: the hook promises not to change its tensor, which saves a copy and a comparison.
        """
        if dir not in ("fwd", "bwd"):
            raise InputError(f"a hook's direction must be 'fwd' or 'bwd', got {dir!r}.")
        if alias_names is not None:
            raise InputError("alias_names is not supported: every loop of a site has one name.")
        with _registering:
            removable = RemovableHandle(self._registered)
            self._registered[removable.id] = hook
            thread = None if level is None else _here.number
            handle = LoopHandle(removable, is_permanent, level, hook, hook, where, reads_only, thread)
            if dir == "fwd":
                self.fwd_hooks = [handle, *self.fwd_hooks] if prepend else [*self.fwd_hooks, handle]
            else:
                self.bwd_hooks = [handle, *self.bwd_hooks] if prepend else [*self.bwd_hooks, handle]
        return handle

    def remove_hooks(
        self,
        dir: Literal["fwd", "bwd", "both"] = "fwd",
        including_permanent: bool = False,
        level: int | None = None,
    ) -> None:
        """Remove hooks, as in TransformerLens; those of another thread's runs stay."""
        if dir not in ("fwd", "bwd", "both"):
            raise InputError(f"a hook's direction must be 'fwd', 'bwd' or 'both', got {dir!r}.")
        if not (self.fwd_hooks or self.bwd_hooks):
            return
        with _registering:
            if dir != "bwd":
                self.fwd_hooks = _without(self.fwd_hooks, including_permanent, level)
            if dir != "fwd":
                self.bwd_hooks = _without(self.bwd_hooks, including_permanent, level)

    def __call__(self, x: Tensor, loop: int | None = None) -> Tensor:
        """The activation after this loop's hooks."""
        if not (self.fwd_hooks or self.bwd_hooks):
            return x
        return self._run(x, loop, compare=False)[0]

    def _acting(self, handles: Iterable[LensHandle], site: HookSite) -> list[LoopHandle]:
        return [
            handle
            for handle in handles
            if isinstance(handle, LoopHandle)
            and handle.here
            and handle.hook.id in self._registered
            and handle.acts_at(site)
        ]

    def handles(self, dir: Direction | None = None) -> list[LoopHandle]:
        """The hooks of this thread's runs, forward and backward or of one direction."""
        if not (self.fwd_hooks or self.bwd_hooks):
            return []
        found = [*(self.fwd_hooks if dir != "bwd" else ()), *(self.bwd_hooks if dir != "fwd" else ())]
        return [handle for handle in found if isinstance(handle, LoopHandle) and handle.here]

    def wants(self, loop: int | None = None) -> bool:
        """Whether any hook acts at this loop: what is not asked for need not be computed."""
        if not (self.fwd_hooks or self.bwd_hooks):
            return False
        site = self.at(loop)
        return bool(self._acting(self.fwd_hooks, site) or self._acting(self.bwd_hooks, site))

    def fire(self, x: Tensor, loop: int | None = None) -> tuple[Tensor, Tensor | None]:
        """Run the hooks of this loop on `x`, a value that the fast path does not form; `settle` takes both results.

        Returns:
            What to go on with; and whether its numbers differ from `x`'s, one boolean on x's device, so that nobody
            waits for it. None where no hook could change them and no gradient is asked for.
        """
        return self._run(x, loop, compare=True)

    def _run(self, x: Tensor, loop: int | None, compare: bool) -> tuple[Tensor, Tensor | None]:
        """See `fire`; without `compare` the second is None.

        A hook that may write gets a copy: the tensor itself may be the caller's initial state, the prelude's output
        that every loop reads again, or in a cache, and none of these is to change when a hook edits in place.
        """
        here = LoopHookPoint(self, loop)
        site = self.at(loop)
        acting = self._acting(self.fwd_hooks, site)
        backward = self._acting(self.bwd_hooks, site) if self.bwd_hooks and torch.is_grad_enabled() else []
        writes = not all(handle.reads_only for handle in acting)
        final = x.clone() if writes else x
        for handle in acting:
            result = handle.fn(final, hook=here)
            if result is not None:
                final = _checked(result, x, here.name)
                if handle is not acting[-1]:  # it may be the caller's, and the next hook may write
                    final = final.clone()
        changed = None
        if compare and writes:
            changed = differ(final, x)
        elif compare and backward:
            changed = torch.zeros((), dtype=torch.bool, device=x.device)
        if backward:
            # A node of its own, as one tensor may pass through several sites; or a leaf where there is no graph yet.
            final = final.view_as(final) if final.requires_grad else final.clone().requires_grad_()
            final.register_hook(partial(_run_backward, [handle.fn for handle in backward], here))
        return final, changed

    def forward(self, x: Tensor, loop: int | None = None) -> Tensor:
        """The same as calling the point."""
        return self(x, loop)


def _without(handles: list[LensHandle], including_permanent: bool, level: int | None) -> list[LensHandle]:
    """The handles that stay, once those of this thread at a level (None: any) are removed."""
    stay = []
    for handle in handles:
        mine = not isinstance(handle, LoopHandle) or handle.here
        if mine and (including_permanent or not handle.is_permanent) and level in (None, handle.context_level):
            handle.hook.remove()
        else:
            stay.append(handle)
    return stay


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

    They are those that the table of `schedule` has under the group's prefix. Not a module itself: `nn.Module` finds
    its submodules through a slow look-up, which 20 hook points a layer would feel.

    Args:
        registry: the model's hook points by name; the new ones are added.
        site: stack and layer of the group; its component is the prefix of theirs ("attn." for "attn.hook_q").
        looped: whether they fire once in every loop.
        without: points that this model does not have.
        only: those of the table that it has; None for all.
    """

    def __init__(
        self,
        registry: HookDict,
        site: HookSite,
        looped: bool,
        without: Container[str] = (),
        only: Container[str] | None = None,
    ):
        for name in points_under(site, looped):
            if name not in without and (only is None or name in only):
                there = HookSite(site.component + name, site.stack, site.layer)
                point = SharedHookPoint(there, looped, registry.progress)
                registry[point.name] = point
                setattr(self, name, point)

    if TYPE_CHECKING:

        def __getattr__(self, name: str) -> SharedHookPoint: ...


Module = TypeVar("Module", bound=type[nn.Module])


def with_hook_points(prefix: str) -> Callable[[Module], Module]:
    """Give a part of a layer its hook points as attributes too: `model.blocks[0].attn.hook_z`.

    As in TransformerLens; a hook on one acts in every loop. Its `hooks` is the group that has them.

    Args:
        prefix: of their names in a layer, such as "attn.".
    """

    def point(name: str) -> property:
        return property(lambda self: getattr(self.hooks, name), doc=f"The point {name} of this layer, in every loop.")

    def add(kind: Module) -> Module:
        for name in points_under(HookSite(prefix, CORE, 0), looped=True):
            setattr(kind, name, point(name))
        return kind

    return add


def settle(fast: Tensor, explicit: Callable[[], Tensor], *changed: Tensor | None) -> Tensor:
    """What goes on from where hooks saw values that the fast path does not form: `explicit` of them if one changed.

    Else the numbers of `fast`, to the bit, with the gradient of `explicit`, so that a hook may stop it or look at it.

    Args:
        fast: the result of the fast path.
        explicit: the same from the values that the hooks left, called only where something may hang on it.
        changed: what `SharedHookPoint.fire` said of each value.
    """
    asked = [one for one in changed if one is not None]
    if not asked:
        return fast
    slow = explicit()
    same = fast.detach()
    if slow.requires_grad:
        same = same + (slow - slow.detach())
    return torch.where(torch.stack(asked).any(), slow, same)


def differ(a: Tensor, b: Tensor) -> Tensor:
    """Whether two tensors of one shape differ in a number, as a boolean on their device; NaN is NaN's equal."""
    return ~((a == b) | ((a != a) & (b != b))).all()
