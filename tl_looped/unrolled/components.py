"""TransformerLens's components around modules of the network: its hook points and projections, our own code.

A component of a module of ours runs that module's forward; a point that the module calls is the component's own, or
quiet where the component of a map inside it fires.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformer_lens.hook_points import HookPoint
from transformer_lens.model_bridge.generalized_components import (
    AttentionBridge,
    BlockBridge,
    GatedMLPBridge,
    LinearBridge,
    MLPBridge,
    NormalizationBridge,
    PositionEmbeddingsAttentionBridge,
)
from transformer_lens.model_bridge.generalized_components.base import GeneralizedComponent

from tl_looped.engine.hooks import HookGroup, differ
from tl_looped.engine.network import Frame
from tl_looped.nn.attention import Attention
from tl_looped.nn.block import Block

# TransformerLens's hook points, called as ours are.


def own(x: Tensor, point: Any) -> Tensor:
    """What a point may give to its hooks: its own copy, as the tensor itself may be read elsewhere, or a caller's."""
    return x.clone() if point.fwd_hooks else x


class Point:
    """Points of TransformerLens as one of ours: one that fires once, or one for every loop."""

    def __init__(self, *points: HookPoint):
        self.points = points

    def __call__(self, x: Tensor, loop: int | None = None) -> Tensor:
        """The activation after its hooks."""
        point = self.points[loop or 0]
        return point(own(x, point))

    def wants(self, loop: int | None = None) -> bool:
        """Whether any hook acts here."""
        point = self.points[loop or 0]
        return bool(point.fwd_hooks or point.bwd_hooks)

    def fire(self, x: Tensor, loop: int | None = None) -> tuple[Tensor, Tensor | None]:
        """See `SharedHookPoint.fire`."""
        if not self.wants(loop):
            return x, None
        found = self(x, loop)
        return found, differ(found, x)


class _Quiet:
    """A point that fires elsewhere."""

    def __call__(self, x: Tensor, loop: int | None = None) -> Tensor:
        return x

    def wants(self, loop: int | None = None) -> bool:
        return False


class Points(HookGroup):
    """The points of a group of ours: those of TransformerLens that are given, quiet ones for the rest."""

    def __init__(self, names: Iterable[str], points: dict[str, Any]):
        vars(self).update({name: points.get(name, _Quiet()) for name in names})


class Places(HookGroup):
    """Where the network's word for a norm is in the view, once or in every loop; stands for that norm's hook points."""

    def __init__(self, *norms: nn.Module):
        self.norms = norms

    def run(self, x: Tensor, loop: int | None) -> Tensor:
        """The norm there."""
        return self.norms[loop or 0](x)


def _points(component: GeneralizedComponent, group: HookGroup, quiet: Collection[str] = ()) -> Points:
    """A component's own points for a group of ours, made where TransformerLens has none."""
    found = {}
    for name in vars(group):
        if name not in quiet:
            if not isinstance(component._modules.get(name), HookPoint):
                setattr(component, name, HookPoint())
            found[name] = Point(cast(HookPoint, component._modules[name]))
    return Points(vars(group), found)


def _without(component: GeneralizedComponent, *points: str) -> None:
    """Leave out points that would never fire."""
    for point in points:
        if point in component._modules:
            delattr(component, point)
            del component._hook_registry[point]


# Components.


class NormAt(NormalizationBridge):
    """A norm of ours, by its own code."""

    def forward(  # pyright: ignore[reportIncompatibleMethodOverride] - called as the norm is
        self, hidden_states: Tensor, loop: int | None = None, hooks: Any = None
    ) -> Tensor:
        """As the norm's own; the hook points are the component's."""
        points = Points((), {})
        vars(points).update(hook_scale=Point(self.hook_scale), hook_normalized=Point(self.hook_normalized))
        return self.hook_out(cast(nn.Module, self.original_component)(self.hook_in(hidden_states), None, points))


class Projection(LinearBridge):
    """Queries, keys or values; those of split inputs, where they are given."""

    _given: Tensor | None = None

    def forward(self, input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """As TransformerLens's."""
        given, self._given = self._given, None
        return super().forward(input) if given is None else given


class Heads(PositionEmbeddingsAttentionBridge):  # of the kinds whose inputs TransformerLens knows how to split
    """Attention of ours, by its own code."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        _without(self, "hook_cos", "hook_sin", "hook_q_normed", "hook_k_normed")

    def set_original_component(self, component: nn.Module) -> None:
        """Have the attention call the points here."""
        AttentionBridge.set_original_component(self, component)  # the parent's asks for a layout
        attn = cast(Attention, component)
        points: Any = _points(self, attn.hooks, self.hook_aliases)
        points.hook_z, points.hook_result = self._z, _Gated(self)
        vars(attn).update(hooks=points, results=self._results)

    def setup_hook_compatibility(self) -> None:
        """As TransformerLens's, with rotated queries and keys [batch, pos, head, d_head]."""
        super().setup_hook_compatibility()
        for name in ("hook_rot_q", "hook_rot_k"):
            if name in self._modules:
                cast(HookPoint, self._modules[name]).hook_conversion = None

    def _z(self, z: Tensor, loop: int | None = None) -> Tensor:
        """Z through the point in front of o, which does not fire again."""
        z = self.o.hook_in(z.flatten(-2)).view_as(z)
        self.o._suppress_next_hook_in = True
        return z

    def _results(self, z: Tensor) -> tuple[Tensor, Tensor | None]:
        return torch.einsum("bphd,hdm->bphm", z, self.W_O), self.b_O

    def forward(self, x: Tensor, frame: Frame, loop: int | None = None) -> Tensor:
        """As the attention's own."""
        x, cfg = self.hook_in(x), cast(Any, self.config)
        if cfg.use_split_qkv_input or cfg.use_attn_in:
            self._split(x)
        return self.hook_out(cast(nn.Module, self.original_component)(x, frame, None))

    def _split(self, x: Tensor) -> None:
        """Queries, keys and values from inputs of their own, as TransformerLens has them."""
        cfg: Any = self.config
        source = x if self._captured_pre_ln_residual is None else self._captured_pre_ln_residual
        counts = {"q": cfg.n_heads, "k": cfg.n_key_value_heads or cfg.n_heads}
        counts["v"] = counts["k"]
        shared = (
            None if cfg.use_split_qkv_input else self._fork_and_norm_per_head(source, self.hook_attn_in, cfg.n_heads)
        )
        for part, n in counts.items():
            own = shared[:, :, :n] if shared is not None else None
            if own is None:
                own = self._fork_and_norm_per_head(source, getattr(self, f"hook_{part}_input"), n)
            projection = getattr(self, part)
            projection._given = self._project_per_head_qkv(projection, own, n, cfg.d_head)


class _Gated(Point):
    """What each head adds, where TransformerLens is asked for it."""

    def __init__(self, heads: Heads):
        super().__init__(heads.hook_result)
        self.heads = heads

    def wants(self, loop: int | None = None) -> bool:
        return bool(cast(Any, self.heads.config).use_attn_result) and super().wants(loop)


class Layer(BlockBridge):
    """A layer of ours, by its own code."""

    def set_original_component(self, original_component: nn.Module) -> None:
        """Have the layer call the points here."""
        super().set_original_component(original_component)
        block = cast(Block, original_component)
        vars(block)["hooks"] = _points(self, block.hooks, ["hook_resid_pre", "hook_resid_post", *self.hook_aliases])
        norms = {name: group for name, group in block.norm_hooks.items() if hasattr(group, "hook_modulated")}
        made = {
            name: _points(self.submodules[name], group, ("hook_scale", "hook_normalized"))
            for name, group in norms.items()
        }
        vars(block)["norm_hooks"] = {name: made.get(name) for name in block.norm_hooks}


class PlainMLP(MLPBridge):
    """An MLP of ours, by its own code, which goes through the components of its maps."""

    def set_original_component(self, original_component: nn.Module) -> None:
        """Have the MLP call no points, as the components of its maps do."""
        super().set_original_component(original_component)
        mlp = cast(Any, original_component)
        vars(mlp)["hooks"] = Points(vars(mlp.hooks), {})

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As the MLP's own."""
        return GeneralizedComponent.forward(self, args[0], None)


class GatedMLP(PlainMLP, GatedMLPBridge):
    """A gated one."""


class Silent(GeneralizedComponent):
    """A component that is no call, and so has no input and output to hook."""

    def __init__(self, name: str, submodules: dict[str, GeneralizedComponent], points: Iterable[str] = ()):
        super().__init__(name, submodules=submodules)
        _without(self, "hook_in", "hook_out")
        for point in points:
            setattr(self, point, HookPoint())


class Loops(Silent):
    """All loops: `view.loop[t]`. TransformerLens would count what is in a list, as layers are, as more layers."""

    def __getitem__(self, t: int) -> nn.Module:
        return self.get_submodule(str(range(len(self.submodules))[t]))
