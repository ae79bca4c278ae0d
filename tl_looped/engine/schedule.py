"""Which layer runs when, and what its hooks are called.

`HookSite` is one place in one loop (or in every loop); its name and its parts are each other's inverse. `LoopSchedule`
is the order in which a model's stacks run, and maps (stack, layer, loop) to realised depth and back. No other module
formats or takes apart a hook name.

A name has TransformerLens's own component, with the loop between the layer and the component::

    blocks.2.loop.3.attn.hook_z     core layer 2 in loop 3
    blocks.2.attn.hook_z            core layer 2 in every loop
    loop.3.hook_state_post          the state leaving loop 3
    hook_state_post                 the state leaving every loop
    prelude.0.hook_resid_post       a layer that runs once
    hook_embed                      a site that fires once
    L_blocks.loop.3.hook_state_post the state of one stack, where several stacks loop
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache

from transformer_lens.utilities.components_utils import get_act_name

from tl_looped.engine.errors import HookNameError, InputError, check_count, nearest, resolve_index

CORE = "blocks"
PRELUDE = "prelude"
CODA = "coda"
FAST = "L_blocks"  # of two stacks on two timescales, the one that runs several times in a loop
SLOW = "H_blocks"  # the one that runs once, and whose state the head reads

LoopCount = int | tuple[int, int]
"""How many loops to run; with two stacks that loop, also (loops, how often the fast stack runs in each)."""

RESID = ("batch", "pos", "d_model")
SCALE = ("batch", "pos", "one")
QUERY = ("batch", "pos", "head", "d_head")
KEY = ("batch", "pos", "kv_head", "d_head")
PATTERN = ("batch", "head", "query", "key")
NEURON = ("batch", "pos", "d_mlp")

GRAD = "_grad"  # behind a name: the gradient of that activation

# The one table of what there is to read and write: component -> axes of its activation, in the order in which they
# fire (in a residual sandwich ln1_post and ln2_post come after hook_attn_out and hook_mlp_out). A module of `nn` makes
# a hook point for each entry under its prefix, so a new line is a new point: the module then calls it.
BLOCK_AXES: dict[str, tuple[str, ...]] = {
    "hook_resid_pre": RESID,
    "hook_modulation": ("batch", "pos", "modulation"),
    "ln1.hook_scale": SCALE,
    "ln1.hook_normalized": RESID,
    "ln1.hook_modulated": RESID,
    "attn.hook_q": QUERY,
    "attn.hook_k": KEY,
    "attn.hook_value_gate": ("batch", "pos", "kv_head"),
    "attn.hook_value_embed": KEY,
    "attn.hook_v": KEY,
    "attn.hook_rot_q": QUERY,
    "attn.hook_rot_k": KEY,
    "attn.hook_attn_scores": PATTERN,
    "attn.hook_pattern": PATTERN,
    "attn.hook_gate": QUERY,
    "attn.hook_z": QUERY,
    "attn.hook_result": ("batch", "pos", "head", "d_model"),
    "ln1_post.hook_scale": SCALE,
    "ln1_post.hook_normalized": RESID,
    "hook_attn_out": RESID,
    "hook_resid_mid": RESID,
    "ln2.hook_scale": SCALE,
    "ln2.hook_normalized": RESID,
    "ln2.hook_modulated": RESID,
    "mlp.hook_pre": NEURON,
    "mlp.hook_pre_linear": NEURON,
    "mlp.hook_post": NEURON,
    "ln2_post.hook_scale": SCALE,
    "ln2_post.hook_normalized": RESID,
    "hook_mlp_out": RESID,
    "hook_resid_post": RESID,
}
LOOP_AXES: dict[str, tuple[str, ...]] = {
    "hook_state_pre": RESID,
    "hook_injection_in": RESID,
    "hook_injection_decay": RESID,
    "hook_injection_step": RESID,
    "hook_injection": RESID,
    "hook_condition": RESID,
    "hook_core_out": RESID,
    "hook_update_gate": RESID,
    "ln_loop.hook_scale": SCALE,
    "ln_loop.hook_normalized": RESID,
    "hook_state_post": RESID,
    "hook_exit_gate": ("batch", "pos"),
    "hook_halt_gate": ("batch", "pos", "choice"),
}
MODEL_AXES: dict[str, tuple[str, ...]] = {
    "hook_embed": RESID,
    "hook_pos_embed": RESID,
    "ln_embed.hook_scale": SCALE,
    "ln_embed.hook_normalized": RESID,
    "ln_prelude.hook_scale": SCALE,
    "ln_prelude.hook_normalized": RESID,
    "hook_state_init": RESID,
    "hook_state_out": RESID,
    "ln_coda.hook_scale": SCALE,
    "ln_coda.hook_normalized": RESID,
    "ln_final.hook_scale": SCALE,
    "ln_final.hook_normalized": RESID,
    "hook_head_in": ("batch", "pos", "d_embed"),
}
# What a run computes of its tokens, beside the prelude's layers.
_INPUT = ("hook_embed", "hook_pos_embed", "ln_embed", "ln_prelude")
READS_TOKENS = frozenset(name for name in MODEL_AXES if name.startswith(_INPUT))
# What comes before the layers of a pass; everything else that is of no layer comes behind them.
LEAD_IN = ("hook_embed", "hook_pos_embed", "ln_embed", "hook_state_pre", "hook_injection", "hook_state_out", "ln_coda")
# What a run computes and reads nowhere: no gradient of the output comes there.
DEAD_ENDS = frozenset({"hook_exit_gate", "hook_halt_gate"})

_NAME = re.compile(
    r"(?:(?P<stack>\w*blocks|prelude|coda)\.(?:(?P<layer>\d+)\.)?)?(?:loop\.(?P<loop>\d+)\.)?(?P<component>.+)"
)
_STACKS = (PRELUDE, CORE, CODA, FAST, SLOW)
_COMPONENT = re.compile(r"(?:(?:attn|mlp|ln\w*)\.)?hook_[a-z_]+")


@dataclass(frozen=True, order=True)
class HookSite:
    """One place where an activation can be read or written.

    Attributes:
        component: TransformerLens's component name, such as "attn.hook_pattern".
        stack: "blocks" (the core), "prelude", "coda"; "L_blocks" or "H_blocks", where two stacks loop; or None for a
            site that belongs to no stack of layers (the state of the only core, the embedding, the final norm).
        layer: index in the stack, from 0; None with a stack means a site of its loop, such as its own state.
        loop: index of the loop, from 0; None means every loop, or a site that fires once.
    """

    component: str
    stack: str | None = None
    layer: int | None = None
    loop: int | None = None

    def __hash__(self) -> int:
        return hash(self.name)

    @cached_property
    def name(self) -> str:
        """The hook name, e.g. "blocks.2.loop.3.attn.hook_z"."""
        parts = [str(part) for part in (self.stack, self.layer) if part is not None]
        if self.loop is not None:
            parts += ["loop", str(self.loop)]
        return ".".join([*parts, self.component])

    @classmethod
    def parse(cls, name: str) -> HookSite:
        """The site that `name` means; the inverse of `.name`.

        Raises:
            HookNameError: when the name does not have the form of a hook name. Whether a model has such a site is for
                the model to say.
        """
        return _parsed(name)

    def at(self, loop: int | None) -> HookSite:
        """The same site at another loop, or with None its name for every loop."""
        return self if loop == self.loop else _at(self, loop)

    @property
    def axes(self) -> tuple[str, ...]:
        """Names of the activation's axes, batch first."""
        return _table()[self.component.removesuffix(GRAD)]

    @property
    def in_layer(self) -> bool:
        """Whether every layer of a stack has the site."""
        return self.component.removesuffix(GRAD) in BLOCK_AXES

    @property
    def looped(self) -> bool:
        """Whether the site fires in every loop, not once in a run."""
        return self.component.removesuffix(GRAD) in LOOP_AXES or (self.in_layer and self.stack not in (PRELUDE, CODA))

    @property
    def pos_axis(self) -> int:
        """The axis of `axes` that counts positions (of queries, for patterns)."""
        return self.axes.index("query" if "query" in self.axes else "pos")


def points_under(group: HookSite, looped: bool) -> list[str]:
    """What the table has under a module's prefix: "hook_q", "hook_k", ... for the site "attn." of some layer."""
    table = BLOCK_AXES if group.layer is not None else LOOP_AXES if looped else MODEL_AXES
    prefix = group.component
    return [name.removeprefix(prefix) for name in table if name.rpartition("hook_")[0] == prefix]


def find_site(name: str, layer_type: str | None = None) -> HookSite:
    """The site that a short or full name means; what the name does not say of layer and loop is None in it.

    A short name is what comes behind "hook_" ("pattern", "state_post"), with the module where several have one
    ("ln1.scale"); TransformerLens's other words ("attn", "mlp_post") are read too. "prelude.", "coda." or another stack
    may stand in front, "_grad" behind.

    Args:
        name: short or full name.
        layer_type: the module, as in TransformerLens: "ln1", "attn", "mlp", ...

    Raises:
        HookNameError: there is no such site, with the nearest names; or there are several.
    """
    first, _, rest = name.partition(".")
    stack, short = (first, rest) if first in _STACKS else (None, name)
    base = short.removesuffix(GRAD)
    grad = short[len(base) :]
    site = HookSite.parse(name) if "hook_" in name else HookSite(_full(base, layer_type) + grad, stack)
    component = site.component.removesuffix(GRAD)
    if component not in _table():
        spelled = [one for known in _table() for one in (known, *_spellings(known))]
        raise HookNameError(f"there is no site {name!r}.{nearest(component if 'hook_' in name else base, spelled)}")
    if site.in_layer:
        return site if site.stack is not None else replace(site, stack=CORE)
    if site.stack in (PRELUDE, CORE, CODA) or (site.stack is not None and not site.looped):
        raise HookNameError(f"{component!r} belongs to no layer: leave {site.stack!r} out of {name!r}.")
    return site


def find_component(name: str) -> str:
    """The component of a short name, for who goes over its layers and loops by himself.

    Raises:
        HookNameError: as `find_site`; or the name says a stack, a layer or a loop.
    """
    site = find_site(name)
    if site != HookSite(site.component, CORE if site.in_layer else None) or site.component.endswith(GRAD):
        known = site.component.removesuffix(GRAD)
        raise HookNameError(f"{name!r} names one place, and here a site of all places is needed: pass {known!r}.")
    return site.component


def _table() -> dict[str, tuple[str, ...]]:
    return {**BLOCK_AXES, **LOOP_AXES, **MODEL_AXES}


def _spellings(component: str) -> tuple[str, str]:
    """The short names of a component: "z" and "attn.z"."""
    return component.rpartition("hook_")[2], component.replace("hook_", "")


def _full(short: str, layer_type: str | None) -> str:
    """The component of a short name, or what it would be called."""
    module = "" if layer_type is None else f"{layer_type}."
    found = [name for name in _table() if short in _spellings(name) and name.startswith(module)]
    if len(found) > 1:
        raise HookNameError(f"{short!r} is at several places: say which of {', '.join(map(repr, found))}.")
    if found:
        return found[0]
    if any(map(str.isdigit, short)):  # TransformerLens would read "k0" as k of layer 0
        return f"hook_{short}"
    return get_act_name(short, 0, layer_type).removeprefix("blocks.0.")


# Names and sites are asked for at every firing of a hook, so each is made once.


@lru_cache(maxsize=2**16)
def _parsed(name: str) -> HookSite:
    match = _NAME.fullmatch(name)
    if match is None or not _COMPONENT.fullmatch(match["component"]):
        raise HookNameError(
            f"{name!r} does not have the form of a hook name, such as 'blocks.2.loop.3.attn.hook_z', "
            "'loop.3.hook_state_post' or 'prelude.0.hook_resid_post'."
        )
    layer, loop = (int(match[part]) if match[part] is not None else None for part in ("layer", "loop"))
    site = HookSite(match["component"], match["stack"], layer, loop)
    if site.name != name:  # leading zeros would give one site two names
        raise HookNameError(f"{name!r} is not written as hook names are: the same site is {site.name!r}.")
    return site


@lru_cache(maxsize=2**16)
def _at(site: HookSite, loop: int | None) -> HookSite:
    return replace(site, loop=loop)


@dataclass(frozen=True)
class Pass:
    """One pass through all layers of a stack. `loop` is None for a stack that runs once.

    `coordinates` are its place in nested loops; the first of them is the loop of the run that it belongs to.
    """

    stack: str
    n_layers: int
    loop: int | None
    coordinates: tuple[int, ...] = ()


@dataclass(frozen=True)
class LoopSchedule:
    """The order in which the stacks of a model run.

    Realised depth d counts every layer call from 0: for p prelude layers, k core layers run T times and c coda layers,
    0 <= d < p + k*T + c.
    """

    passes: tuple[Pass, ...]

    @classmethod
    @lru_cache(maxsize=256, typed=True)
    def looped(cls, n_prelude: int, n_core: int, n_coda: int, n_loops: int) -> LoopSchedule:
        """The (p, k⊗T, c) family: prelude, the core `n_loops` times, coda."""
        check_count("n_loops", n_loops)
        check_count("n_core", n_core)
        once = [Pass(PRELUDE, n_prelude, None)] if n_prelude else []
        end = [Pass(CODA, n_coda, None)] if n_coda else []
        return cls((*once, *(Pass(CORE, n_core, t, (t,)) for t in range(n_loops)), *end))

    @classmethod
    @lru_cache(maxsize=256, typed=True)
    def nested(cls, n_layers: int, h_cycles: int, l_cycles: int) -> LoopSchedule:
        """Two timescales, as HRM-Text has them: in every H cycle, the L stack `l_cycles` times, then the H stack once.

        Each stack has one flat loop count; `coordinates` gives a loop's (H, L) or (H,) place.
        """
        for name, value in (("n_layers", n_layers), ("h_cycles", h_cycles), ("l_cycles", l_cycles)):
            check_count(name, value)
        passes = []
        for h in range(h_cycles):
            passes += [Pass(FAST, n_layers, h * l_cycles + i, (h, i)) for i in range(l_cycles)]
            passes.append(Pass(SLOW, n_layers, h, (h,)))
        return cls(tuple(passes))

    @cached_property
    def _starts(self) -> dict[tuple[str, int | None], int]:
        starts, depth = {}, 0
        for run in self.passes:
            starts[run.stack, run.loop] = depth
            depth += run.n_layers
        return starts

    @property
    def depth(self) -> int:
        """Number of layer calls in one forward."""
        return sum(run.n_layers for run in self.passes)

    def stacks(self) -> tuple[str, ...]:
        """The stacks, in the order of their first pass."""
        return tuple(dict.fromkeys(run.stack for run in self.passes))

    def n_layers(self, stack: str) -> int:
        """Number of layers of a stack; 0 when the schedule does not run it."""
        return next((run.n_layers for run in self.passes if run.stack == stack), 0)

    def n_loops(self, stack: str | None = CORE) -> int:
        """How often a stack runs as a loop; 0 for one that runs once or not at all. With None, the loops of the run."""
        if stack is None:
            return 1 + max((run.coordinates[0] for run in self.passes if run.loop is not None), default=-1)
        return self._counts.get(stack, 0)

    @cached_property
    def _counts(self) -> dict[str, int]:
        counts: dict[str, int] = {}
        for run in self.passes:
            counts[run.stack] = counts.get(run.stack, 0) + (run.loop is not None)
        return counts

    def looping(self) -> tuple[str, ...]:
        """The stacks that loop, in the order of their first pass."""
        return tuple(stack for stack in self.stacks() if self.n_loops(stack))

    def loops_in(self, stack: str | None, loops: Iterable[int]) -> list[int]:
        """Which loops of a stack lie in some loops of the run, in their order; of no stack, those themselves."""
        if stack is None:
            return list(loops)
        per = self.per_loop(stack)
        return [t * per + i for t in loops for i in range(per)]

    def per_loop(self, stack: str | None) -> int:
        """How often a stack runs in each loop of the run; 0 for one that does not loop."""
        return 1 if stack is None else self.n_loops(stack) // max(1, self.n_loops(None))

    def around(self, stack: str | None, loops: Iterable[int]) -> list[int]:
        """The loops of the run in which some loops of a stack lie."""
        per = self.per_loop(stack)
        return sorted({t // per for t in loops})

    def coordinates(self, stack: str, loop: int) -> tuple[int, ...]:
        """Where a loop lies in nested cycles: (H, L) or (H,) for HRM-Text, (loop,) otherwise."""
        loop = resolve_index("loop", loop, self.n_loops(stack))
        return next(run.coordinates for run in self.passes if run.stack == stack and run.loop == loop)

    def realised_depth(self, stack: str, layer: int, loop: int | None = None) -> int:
        """The realised depth at which `layer` of `stack` runs in `loop` (None for a stack that runs once)."""
        if (stack, loop) not in self._starts:
            raise InputError(f"{stack} does not run in loop {loop}: {self.describe()}.")
        return self._starts[stack, loop] + resolve_index("layer", layer, self.n_layers(stack))

    def at_depth(self, depth: int) -> tuple[str, int, int | None]:
        """The (stack, layer, loop) that runs at a realised depth; the inverse of `realised_depth`."""
        depth = resolve_index("depth", depth, self.depth)
        for run in self.passes:
            if depth < run.n_layers:
                return run.stack, depth, run.loop
            depth -= run.n_layers
        raise AssertionError("unreachable: depth was checked")

    def layer_calls(self) -> Iterator[tuple[str, int, int | None]]:
        """Every (stack, layer, loop), in the order in which they run."""
        for run in self.passes:
            for layer in range(run.n_layers):
                yield run.stack, layer, run.loop

    def describe(self) -> str:
        """A line such as "prelude 2, blocks 4 x 32 loops, coda 2"."""
        texts = []
        for stack in self.stacks():
            loops = self.n_loops(stack)
            texts.append(f"{stack} {self.n_layers(stack)}" + (f" x {loops} loops" if loops else ""))
        return ", ".join(texts)
