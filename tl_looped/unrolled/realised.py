"""A looped model with every layer call as a module of its own, on the looped model's Parameters, and its adapter.

Nothing is computed here: the network's own code runs, on copies of its modules that hold the same Parameters.
TransformerLens's bridge components take the places of these copies, and their hook points those of the network's.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Iterable
from typing import Any, cast

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from transformer_lens.config import TransformerBridgeConfig
from transformer_lens.hook_points import HookPoint
from transformer_lens.model_bridge.architecture_adapter import ArchitectureAdapter
from transformer_lens.model_bridge.generalized_components import (
    AttentionBridge,
    BlockBridge,
    EmbeddingBridge,
    GatedMLPBridge,
    LinearBridge,
    MLPBridge,
    NormalizationBridge,
    PosEmbedBridge,
    PositionEmbeddingsAttentionBridge,
    UnembeddingBridge,
)
from transformer_lens.model_bridge.generalized_components.base import GeneralizedComponent

from tl_looped.engine.errors import InputError
from tl_looped.engine.hooks import HookGroup, differ
from tl_looped.engine.network import CappedLinear, Frame, Network, matrix
from tl_looped.engine.runs import resolve_positions, resolve_state, visibility
from tl_looped.nn.attention import Attention
from tl_looped.nn.block import Block
from tl_looped.unrolled.architecture import Architecture

_NORMS = ("ln1", "ln1_post", "ln2", "ln2_post")


# Copies of the network's modules.


def _twin(module: nn.Module, name: str) -> nn.Module:
    """A module again, as an object of its own with the same Parameters, seen by no hook of the model.

    Raises:
        InputError: a linear map in it is more than a weight and a bias, or is parametrised.
    """
    if isinstance(module, (nn.Linear, nn.Embedding)) and not isinstance(matrix(module, name), nn.Parameter):
        raise InputError(f"{name} is parametrised, so a view can't share its weight: remove the parametrisation first.")
    twin = copy.copy(module)
    twin.__dict__.update({key: value.copy() for key, value in vars(module).items() if isinstance(value, dict)})
    for part, child in module.named_children():
        twin._modules[part] = _twin(child, f"{name}.{part}")
    return twin


class _Embed(nn.Module):
    """Tokens to vectors, scaled; vectors stay what they are, where a run starts from them."""

    def __init__(self, weight: nn.Parameter, scale: float):
        super().__init__()
        self.weight, self.scale = weight, scale

    def forward(self, tokens: Tensor) -> Tensor:
        if tokens.is_floating_point():
            return tokens
        x = F.embedding(tokens, self.weight)
        return x if self.scale == 1.0 else x * self.scale


class _Head(nn.Module):  # no nn.Linear, to which TransformerLens would add a bias that does not follow the weights
    def __init__(self, unembed: nn.Linear, takes_bias: bool):
        super().__init__()
        self.weight = unembed.weight
        if cast("Tensor | None", unembed.bias) is None and takes_bias:  # of the norm before it, if that is folded in
            self.register_buffer("bias", torch.zeros_like(self.weight[:, 0]))
        else:
            self.bias = unembed.bias
        self.capped = unembed.capped if isinstance(unembed, CappedLinear) else lambda logits: logits

    def forward(self, x: Tensor) -> Tensor:
        return self.capped(F.linear(x, self.weight, None if self.bias is None else self.bias.to(self.weight)))


class Realised(nn.Module):
    """The looped model at one loop count: all its layer calls in a row.

    Args:
        network: whose Parameters it shares, and whose code it runs.
        arch: what it is.
        state: the state that enters the first loop, [batch, pos, d_state] or [pos, d_state]; None for the model's own.
        seed: seed of a drawn state.
    """

    network: Any
    embed: Any
    blocks: Any

    def __init__(self, network: Network, arch: Architecture, state: Tensor | None, seed: int | None):
        super().__init__()
        self.arch, self.given, self.seed = arch, state, seed
        for name, weight in network.named_parameters(recurse=False):
            self.register_parameter(name, weight)
        for name, module in network.named_children():
            if name not in arch.stacks and name not in ("embed", "unembed", "ln_final", "ln_loop"):
                self.add_module(name, _twin(module, name))
        for module in (network.embed, network.unembed):
            _twin(module, "embed" if module is network.embed else "unembed")  # for its errors
        self.embed = _Embed(cast(nn.Parameter, network.embed.weight), arch.embed_scale)
        self.names = [name.removeprefix("hook_") for name in vars(network.hooks) if name not in arch.fired]
        for name in self.names:
            self.add_module(arch.component(name), nn.Identity())
        calls = list(arch.schedule.layer_calls())
        self.blocks = nn.ModuleList(
            _twin(cast(Any, getattr(network, stack))[layer], f"{stack}.{layer}") for stack, layer, _ in calls
        )
        for path in arch.loops:
            self._place(path, nn.Module())
        for path, name in arch.norms.items():
            self._place(path, _twin(network.get_submodule(name), name))
        self.unembed = _Head(network.unembed, arch.cfg.norm == "layer")
        vars(self)["network"] = self._running(network, calls)

    def _place(self, path: str, module: nn.Module) -> None:
        """Put a module at a path, with what is missing on the way."""
        here: nn.Module = self
        *way, last = path.split(".")
        for part in way:
            if part not in here._modules:
                here.add_module(part, nn.ModuleList() if part == "loop" else nn.Module())
            here = here.get_submodule(part)
        here.add_module(last, module)

    def _running(self, network: Network, calls: list[tuple[str, int, int | None]]) -> Any:
        """The network's code on the modules here, whatever takes their places."""
        running = copy.copy(network)
        depths = {call: depth for depth, call in enumerate(calls)}

        def layer(stack: str, index: int) -> Callable[..., Tensor]:
            def call(x: Tensor, frame: Frame, loop: int | None = None) -> Tensor:
                block = self.blocks[depths[stack, index, loop]]
                return block(_own(x, block.hook_in), frame=frame)

            return call

        stacks = {name: [layer(name, i) for i in range(self.arch.schedule.n_layers(name))] for name in self.arch.stacks}
        parts = {"_modules": self._modules, "_parameters": self._parameters, "cfg": self.arch.unscaled, **stacks}
        # Which copy of these runs is for the caller's hooks to say.
        parts |= dict.fromkeys(("ln_final", "ln_loop"), lambda x, loop, where: where(x, loop))
        vars(running).update(parts)
        return running

    def connect(self) -> None:
        """Have the network's code fire the hook points of the components that are in place of the modules by now."""
        running, find = self.network, self.get_submodule
        places: dict[str, Any] = {f"hook_{name}": find(self.arch.component(name)) for name in self.names}
        root = {name: _Point(place.hook_out) for name, place in places.items()}
        norms: dict[Any, Any] = dict.fromkeys(running.norm_hooks)  # of norms that have one place only
        for name, paths in self.arch.norm_calls.items():
            norms[name] = lambda x, loop=None, paths=paths: find(paths[loop or 0])(x)
        by_stack = running.loop_hooks if isinstance(running.loop_hooks, dict) else {None: running.loop_hooks}
        groups: dict[Any, Any] = {}
        for stack, group in by_stack.items():
            each = [find(path) for path, of in self.arch.loops.items() if of == stack]
            points = {name: _Point(*(getattr(one, name) for one in each)) for name in vars(group)}
            groups[stack] = _Points(vars(group), points)
        loops = groups if isinstance(running.loop_hooks, dict) else groups[None]
        vars(running).update(hooks=_Points(vars(running.hooks), root), norm_hooks=norms, loop_hooks=loops)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
    ) -> Float[Tensor, "batch pos d_vocab"]:
        """Logits; masks and positions as `LoopedModel` takes them."""
        cfg, network = self.arch.cfg, self.network
        read = cast(Tensor, inputs_embeds if input_ids is None else input_ids)
        tokens = torch.zeros(read.shape[:2], dtype=torch.long, device=read.device) if input_ids is None else input_ids
        if cfg.puzzles is not None or (input_ids is None and cfg.reads_tokens_in_layers):
            self._check_tokens(tokens, input_ids is None)
        mask = attention_mask
        both = None  # tokens that see each other in both directions
        if not cfg.causal and (mask is None or mask.ndim == 2):
            both = torch.ones_like(tokens, dtype=torch.bool) if mask is None else mask.to(tokens.device).bool()
        real, visible = visibility(tokens, mask, None, both)
        positions = resolve_positions(real, position_ids, cfg.n_ctx if cfg.learned_positions else None)
        alike = mask is None and position_ids is None  # in all rows
        steps = self.arch.steps
        frame = network.frame(visible, positions[:1] if alike else positions, tokens, self.arch.l_cycles, steps)
        state, _ = resolve_state(cfg, positions, self._given(positions), self.seed, self.embed.weight.dtype, False)
        if state is not None and torch.is_grad_enabled() and not state.requires_grad:
            state = state.detach().requires_grad_()  # gradients come to it also where no weight is trained
        x, e = network.begin(read, frame, state)
        for t in range(self.arch.n_loops):
            x = network.loop(x, e, frame, t)
        return network.readout(x, frame)

    def _check_tokens(self, tokens: Tensor, embedded: bool) -> None:
        cfg = self.arch.cfg
        if embedded:
            raise InputError(f"{cfg.model_name} reads tokens, and here are vectors in their place: pass token ids.")
        rows = 0 if cfg.puzzles is None else cfg.puzzles.rows
        of_puzzle = torch.arange(tokens.shape[1], device=tokens.device) < rows
        if tokens.shape[1] <= rows or not bool(((tokens >= cfg.d_vocab) == of_puzzle).all()):
            raise InputError(
                "prompts must begin with the tokens of one puzzle, and have them nowhere else: put "
                "looped.cfg.puzzle_tokens(puzzle) before them."
            )

    def _given(self, positions: Tensor) -> Tensor | None:
        given, shape = self.given, (*positions.shape, self.arch.cfg.d_state)
        if given is None:
            return None
        given = given.to(positions.device)[positions] if given.ndim == 2 else given
        if given.shape != shape:
            raise InputError(
                f"this view starts from an initial_state of shape {tuple(given.shape)}, and these prompts need "
                f"{shape}: make a view for them, or one with a state of [pos, d_model]."
            )
        return given


# TransformerLens's hook points, called as ours are.


def _own(x: Tensor, point: Any) -> Tensor:
    """What a point may give to its hooks: its own copy, as the tensor itself may be read elsewhere, or a caller's."""
    return x.clone() if point.fwd_hooks else x


class _Point:
    """Points of TransformerLens as one of ours: one that fires once, or one for every loop."""

    def __init__(self, *points: HookPoint):
        self.points = points

    def __call__(self, x: Tensor, loop: int | None = None) -> Tensor:
        point = self.points[loop or 0]
        return point(_own(x, point))

    def wants(self, loop: int | None = None) -> bool:
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


class _Points(HookGroup):
    """A group of ours whose points are those of TransformerLens that are given, and quiet ones for the rest."""

    def __init__(self, names: Iterable[str], points: dict[str, Any]):
        for name in names:
            setattr(self, name, points.get(name, _Quiet()))


def _points(component: GeneralizedComponent, group: HookGroup, quiet: Collection[str] = ()) -> _Points:
    """A component's own points for a group of ours, made where TransformerLens has none."""
    found = {}
    for name in vars(group):
        if name not in quiet:
            if not isinstance(component._modules.get(name), HookPoint):
                setattr(component, name, HookPoint())
            found[name] = _Point(cast(HookPoint, component._modules[name]))
    return _Points(vars(group), found)


def _without(component: GeneralizedComponent, *points: str) -> None:
    """Leave out points that would never fire."""
    for point in points:
        if point in component._modules:
            delattr(component, point)
            del component._hook_registry[point]


# Components.


class _Norm(NormalizationBridge):
    """A norm of ours, by its own code."""

    def forward(  # pyright: ignore[reportIncompatibleMethodOverride] - called as the norm is
        self, hidden_states: Tensor, loop: int | None = None, hooks: Any = None
    ) -> Tensor:
        """As the norm's own; the hook points are the component's."""
        own = {"hook_scale": _Point(self.hook_scale), "hook_normalized": _Point(self.hook_normalized)}
        points = _Points(own, own)
        return self.hook_out(cast(nn.Module, self.original_component)(self.hook_in(hidden_states), None, points))


class _Projection(LinearBridge):
    """Queries, keys or values; those of split inputs, where they are given."""

    _given: Tensor | None = None

    def forward(self, input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        given, self._given = self._given, None
        return super().forward(input) if given is None else given


class _Heads(PositionEmbeddingsAttentionBridge):  # of the kinds whose inputs TransformerLens knows how to split
    """Attention of ours, by its own code."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        _without(self, "hook_cos", "hook_sin", "hook_q_normed", "hook_k_normed")

    def set_original_component(self, component: nn.Module) -> None:
        AttentionBridge.set_original_component(self, component)  # the parent's asks for a layout
        attn = cast(Attention, component)
        points: Any = _points(self, attn.hooks, self.hook_aliases)
        points.hook_z, points.hook_result = self._z, _Gated(self)
        vars(attn).update(hooks=points, results=self._results)

    def setup_hook_compatibility(self) -> None:
        super().setup_hook_compatibility()
        for name in ("hook_rot_q", "hook_rot_k"):
            if name in self._modules:
                cast(HookPoint, self._modules[name]).hook_conversion = None  # they are [batch, pos, head, d_head] here

    def _z(self, z: Tensor, loop: int | None = None) -> Tensor:
        """Z through the point in front of o, which does not fire again."""
        z = self.o.hook_in(z.flatten(-2)).view_as(z)
        self.o._suppress_next_hook_in = True
        return z

    def _results(self, z: Tensor) -> tuple[Tensor, Tensor | None]:
        return torch.einsum("bphd,hdm->bphm", z, self.W_O), self.b_O

    def forward(self, x: Tensor, frame: Frame, loop: int | None = None) -> Tensor:
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


class _Gated(_Point):
    """What each head adds, where TransformerLens is asked for it."""

    def __init__(self, heads: _Heads):
        super().__init__(heads.hook_result)
        self.heads = heads

    def wants(self, loop: int | None = None) -> bool:
        return bool(cast(Any, self.heads.config).use_attn_result) and super().wants(loop)


class _Layer(BlockBridge):
    """A layer of ours, by its own code."""

    def set_original_component(self, original_component: nn.Module) -> None:
        super().set_original_component(original_component)
        block = cast(Block, original_component)
        vars(block)["hooks"] = _points(self, block.hooks, ["hook_resid_pre", "hook_resid_post", *self.hook_aliases])
        norms = {name: group for name, group in block.norm_hooks.items() if hasattr(group, "hook_modulated")}
        made = {
            name: _points(self.submodules[name], group, ("hook_scale", "hook_normalized"))
            for name, group in norms.items()
        }
        vars(block)["norm_hooks"] = {name: made.get(name) for name in block.norm_hooks}


class _Plain(MLPBridge):
    """An MLP of ours, by its own code, which goes through the components of its maps."""

    def set_original_component(self, original_component: nn.Module) -> None:
        super().set_original_component(original_component)
        mlp = cast(Any, original_component)
        vars(mlp)["hooks"] = _Points(vars(mlp.hooks), {})

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return GeneralizedComponent.forward(self, args[0], None)


class _GatedMLP(_Plain, GatedMLPBridge):
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


class RealisedAdapter(ArchitectureAdapter):
    """TransformerLens's component for every module of `Realised`."""

    supports_kv_cache = False
    supports_hf_output_attentions = False

    def __init__(self, config: TransformerBridgeConfig, arch: Architecture, model: Realised):
        super().__init__(config)
        cfg = arch.cfg
        self.supports_fold_ln = arch.folding_broken_by() is None
        self.weight_processing_conversions = {**self._qkvo_weight_conversions(include_biases=cfg.qk_bias or cfg.v_bias)}
        layer, self._config = model.blocks[0], config
        attn = {part: _Projection(part) for part in "qkv"} | {"o": LinearBridge("o")}
        maps: dict[str, GeneralizedComponent] = {"in": LinearBridge("up"), "out": LinearBridge("down")}
        if cfg.gated_mlp:
            maps = {"gate": LinearBridge("gate"), **maps}
        parts: dict[str, GeneralizedComponent] = {
            **self._norms(layer, *_NORMS),
            "attn": _Heads("attn", config, {**attn, **self._norms(layer.attn, "q_norm", "k_norm")}),
            "mlp": (_GatedMLP if cfg.gated_mlp else _Plain)("mlp", config, maps),
        }
        blocks = _Layer("blocks", submodules=parts)
        own = {"hook_resid_mid", *(["hook_attn_out", "hook_mlp_out"] if cfg.loop_time else [])}
        names = {"hook_attn_out": "attn.hook_out", "hook_mlp_out": "mlp.hook_out"} if arch.norms_stream else {}
        blocks.hook_aliases = {k: v for k, v in {**blocks.hook_aliases, **names}.items() if k not in own}
        if any(cfg.value_embeds):
            heads = parts["attn"]
            heads.hook_aliases = {k: v for k, v in heads.hook_aliases.items() if k != "hook_v"}
        once = {name: GeneralizedComponent(name) for name in map(arch.component, model.names)}
        ends: dict[str, GeneralizedComponent] = (
            {"pos_embed": PosEmbedBridge("pos_embed")} if cfg.learned_positions else {}
        )
        if cfg.state_out:
            ends["state_out"] = LinearBridge("state_out")
        self.component_mapping = {
            "embed": EmbeddingBridge("embed"),
            **ends,
            **once,
            "blocks": blocks,
            **self._loops(arch, model),
            **self._norms(model, "ln_embed", "ln_prelude", "ln_coda", "ln_final", "ln_head"),
            "unembed": UnembeddingBridge("unembed"),
        }

    def _norms(self, module: Any, *names: str) -> dict[str, Any]:
        return {name: _Norm(name, self._config) for name in names if name in module._modules}

    def _loops(self, arch: Architecture, model: Realised) -> dict[str, GeneralizedComponent]:
        """What loops have beside their layers, at the looped model's names."""
        by_stack: dict[str | None, dict[str, Any]] = {}
        for path, stack in arch.loops.items():
            groups = model.network.loop_hooks
            points = vars(groups if stack is None else groups[stack])
            number = path.rpartition(".")[2]
            inner = self._norms(model.get_submodule(path), "ln_loop")
            by_stack.setdefault(stack, {})[number] = Silent(number, inner, points)
        loops = {stack: Loops("loop", parts) for stack, parts in by_stack.items()}
        short = {stack: arch.short(stack) for stack in loops if stack is not None}
        return {name: Silent(name, {"loop": loops[stack]}) for stack, name in short.items()} or {"loop": loops[None]}
