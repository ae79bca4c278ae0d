"""A looped model with every layer call as a module of its own, on the looped model's Parameters, and its adapter.

Nothing is computed here: the network's own code runs, on copies of its modules that hold the same Parameters.
TransformerLens's bridge components take the places of these copies, and their hook points those of the network's.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any, cast

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from transformer_lens.config import TransformerBridgeConfig
from transformer_lens.model_bridge.architecture_adapter import ArchitectureAdapter
from transformer_lens.model_bridge.generalized_components import (
    EmbeddingBridge,
    LinearBridge,
    PosEmbedBridge,
    UnembeddingBridge,
)
from transformer_lens.model_bridge.generalized_components.base import GeneralizedComponent

from tl_looped.engine.errors import InputError
from tl_looped.engine.network import CappedLinear, Frame, Network, matrix
from tl_looped.engine.runs import resolve_positions, resolve_state, visibility
from tl_looped.unrolled.architecture import Architecture
from tl_looped.unrolled.components import (
    GatedMLP,
    Heads,
    Layer,
    Loops,
    NormAt,
    Places,
    PlainMLP,
    Point,
    Points,
    Projection,
    Silent,
    own,
)

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
    """Tokens to vectors, scaled; or the vectors that a run starts from in their place."""

    instead: Tensor | None = None

    def __init__(self, weight: nn.Parameter, scale: float):
        super().__init__()
        self.weight, self.scale = weight, scale

    def forward(self, tokens: Tensor) -> Tensor:
        if self.instead is not None:
            return self.instead.clone()
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
    vectors: _Embed
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
        self.embed = vars(self)["vectors"] = _Embed(cast(nn.Parameter, network.embed.weight), arch.embed_scale)
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

        def layer(stack: str, index: int) -> Callable[..., Tensor]:  # no closure, which a copy of the view would share
            return partial(self._layer, {t: depth for (*at, t), depth in depths.items() if at == [stack, index]})

        stacks = {name: [layer(name, i) for i in range(self.arch.schedule.n_layers(name))] for name in self.arch.stacks}
        parts = {"_modules": self._modules, "_parameters": self._parameters, "cfg": self.arch.unscaled, **stacks}
        # Which copy of these runs is for the caller's hooks to say.
        parts |= dict.fromkeys(("ln_final", "ln_loop"), lambda x, loop, where: where.run(x, loop))
        parts["needs_input"] = lambda state_given: True  # every layer runs, also one whose output is not read
        vars(running).update(parts)
        return running

    def _layer(self, depths: dict[int | None, int], x: Tensor, frame: Frame, loop: int | None = None) -> Tensor:
        block = self.blocks[depths[loop]]
        return block(own(x, block.hook_in), frame=frame)

    def connect(self) -> None:
        """Have the network's code fire the hook points of the components that are in place of the modules by now."""
        running, find = self.network, self.get_submodule
        places: dict[str, Any] = {f"hook_{name}": find(self.arch.component(name)) for name in self.names}
        root = {name: Point(place.hook_out) for name, place in places.items()}
        norms: dict[Any, Any] = dict.fromkeys(running.norm_hooks)  # of norms that have one place only
        norms |= {name: Places(*map(find, paths)) for name, paths in self.arch.norm_calls.items()}
        by_stack = running.loop_hooks if isinstance(running.loop_hooks, dict) else {None: running.loop_hooks}
        groups: dict[Any, Any] = {}
        for stack, group in by_stack.items():
            each = [find(path) for path, of in self.arch.loops.items() if of == stack]
            points = {name: Point(*(getattr(one, name) for one in each)) for name in vars(group)}
            groups[stack] = Points(vars(group), points)
        loops = groups if isinstance(running.loop_hooks, dict) else groups[None]
        vars(running).update(hooks=Points(vars(running.hooks), root), norm_hooks=norms, loop_hooks=loops)

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
        try:
            self.vectors.instead = inputs_embeds if input_ids is None else None
            x, e = network.begin(tokens, frame, state)
        finally:  # a run may stop at a layer
            self.vectors.instead = None
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
        attn = {part: Projection(part) for part in "qkv"} | {"o": LinearBridge("o")}
        maps: dict[str, GeneralizedComponent] = {"in": LinearBridge("up"), "out": LinearBridge("down")}
        if cfg.gated_mlp:
            maps = {"gate": LinearBridge("gate"), **maps}
        parts: dict[str, GeneralizedComponent] = {
            **self._norms(layer, *_NORMS),
            "attn": Heads("attn", config, {**attn, **self._norms(layer.attn, "q_norm", "k_norm")}),
            "mlp": (GatedMLP if cfg.gated_mlp else PlainMLP)("mlp", config, maps),
        }
        blocks = Layer("blocks", submodules=parts)
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
        return {name: NormAt(name, self._config) for name in names if name in module._modules}

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
