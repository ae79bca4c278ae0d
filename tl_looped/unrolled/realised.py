"""A looped model with every layer call as a module of its own, on the looped model's Parameters, and its adapter.

TransformerLens's bridge components take the places of the modules here, and so `Realised.forward` calls them.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from transformer_lens.config import TransformerBridgeConfig
from transformer_lens.hook_points import HookPoint
from transformer_lens.model_bridge.architecture_adapter import ArchitectureAdapter
from transformer_lens.model_bridge.generalized_components import (
    BlockBridge,
    EmbeddingBridge,
    GatedMLPBridge,
    LinearBridge,
    PositionEmbeddingsAttentionBridge,
    RMSNormalizationBridge,
    UnembeddingBridge,
)
from transformer_lens.model_bridge.generalized_components.base import GeneralizedComponent

from tl_looped.engine.errors import InputError
from tl_looped.engine.network import matrix
from tl_looped.engine.runs import resolve_positions, resolve_state, visibility
from tl_looped.engine.schedule import CODA, CORE, PRELUDE
from tl_looped.nn import LoopedTransformer
from tl_looped.nn.block import Block
from tl_looped.unrolled.architecture import Architecture

Module = TypeVar("Module", bound=nn.Module)
_NORMS = ("ln1", "ln1_post", "ln2", "ln2_post")


def _parameter(module: nn.Module, name: str) -> nn.Parameter:
    """The weight that is the whole map, but for a bias; an adapter or a quantised or parametrised map is an error."""
    weight = matrix(module, name)
    if not isinstance(weight, nn.Parameter):
        raise InputError(f"{name} is parametrised, so a view can't share its weight: remove the parametrisation first.")
    return weight


def _sharing(module: Module, name: str) -> Module:
    """A norm or a linear map again, as an object of its own with the same Parameters, seen by no hook of the model."""
    if isinstance(module, nn.Linear):
        _parameter(module, name)
    twin = copy.copy(module)
    twin.__dict__.update({key: value.copy() for key, value in vars(module).items() if isinstance(value, dict)})
    return twin


class _Modules(nn.Module):
    """A module whose parts are called by their names."""

    if TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any: ...


class _Part(_Modules):
    """The modules of a part of the looped model, each under the name that TransformerLens has for it."""

    head_dim: int
    layer_idx: int
    num_key_value_groups: int
    act: Callable[[Tensor], Tensor]

    def __init__(self, source: nn.Module, place: str, **names: str):
        super().__init__()
        for theirs, ours in names.items():
            if hasattr(source, ours):
                self.add_module(theirs, _sharing(getattr(source, ours), f"{place}{ours}"))


class _Embed(nn.Module):
    def __init__(self, weight: nn.Parameter, scale: float):
        super().__init__()
        self.weight, self.scale = weight, scale

    def forward(self, input_ids: Tensor) -> Tensor:
        x = F.embedding(input_ids, self.weight)
        return x if self.scale == 1.0 else x * self.scale


class _Head(nn.Module):  # no nn.Linear, to which TransformerLens would add a bias that does not follow the weights
    def __init__(self, weight: nn.Parameter):
        super().__init__()
        self.weight = weight

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight)


class _Layer(_Part):
    def __init__(self, block: Block, place: str, depth: int, arch: Architecture):
        super().__init__(block, place, **{name: name for name in _NORMS})
        attn = _Part(block.attn, f"{place}attn.", **{name: name for name in (*"qkvo", "q_norm", "k_norm")})
        attn.head_dim, attn.layer_idx = arch.cfg.d_head, depth  # what TransformerLens asks beside weights
        attn.num_key_value_groups = arch.cfg.n_heads // arch.cfg.kv_heads
        self.attn, self.mlp = attn, _MLP(block.mlp, f"{place}mlp.", gate="gate", out="down", **{"in": "up"})
        self.mlp.act = arch.act
        self.mid = nn.Identity()  # TransformerLens's own resid_mid is on the way to the MLP only
        self.before, self.norms_stream = hasattr(self, "ln1"), arch.norms_stream
        self.after = hasattr(self, "ln1_post") and not arch.norms_stream

    def forward(self, x: Tensor, position_embeddings: tuple[Tensor, Tensor], attention_mask: Tensor | None) -> Tensor:
        read = self.ln1(x) if self.before else x
        out, _ = self.attn(read, position_embeddings=position_embeddings, attention_mask=attention_mask)
        x = x + (self.ln1_post(out) if self.after else out)
        x = self.mid(self.ln1_post(x) if self.norms_stream else x)
        out = self.mlp(self.ln2(x) if self.before else x)
        x = x + (self.ln2_post(out) if self.after else out)
        return self.ln2_post(x) if self.norms_stream else x


class _MLP(_Part):
    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.act(self.gate(x)) * self.get_submodule("in")(x))


class Realised(_Modules):
    """The looped model at one loop count: p + k·T + c layers in a row.

    Args:
        transformer: whose Parameters it shares.
        arch: what it is.
        state: the state that enters the first loop, [batch, pos, d_model] or [pos, d_model]; None for the model's own.
        seed: seed of a drawn state.
    """

    def __init__(self, transformer: LoopedTransformer, arch: Architecture, state: Tensor | None, seed: int | None):
        super().__init__()
        self.arch, self.given, self.seed = arch, state, seed
        self.frequencies = arch.frequencies()  # no buffer, which .to(dtype) would round
        self.embed = _Embed(_parameter(transformer.embed, "embed"), transformer.cfg.embed_scale)
        self.state_init = nn.Identity()
        self.blocks = nn.ModuleList(
            _Layer(getattr(transformer, stack)[layer], f"{stack}.{layer}.", depth, arch)
            for depth, (stack, layer, _) in enumerate(arch.schedule.layer_calls())
        )
        always = {"injection": "injection", "exit_gate": "exit_gate"}
        norms = ({"ln_loop": "ln_final"} if arch.closes(t) else {} for t in range(arch.n_loops))
        self.loop = nn.ModuleList(_Part(transformer, "", **always, **norm) for norm in norms)
        for name in (*["ln_coda"] * arch.norms_before_coda, *filter(None, [arch.head_norm])):
            self.add_module(name, _sharing(transformer.ln_final, name))
        self.unembed = _Head(_parameter(transformer.unembed, "unembed"))

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
    ) -> Float[Tensor, "batch pos d_vocab"]:
        """Logits; masks and positions as `LoopedModel` takes them."""
        x = self.embed(input_ids) if inputs_embeds is None else inputs_embeds
        tokens = torch.zeros(x.shape[:2], dtype=torch.long, device=x.device) if input_ids is None else input_ids
        real, visible = visibility(tokens, attention_mask, None)
        positions = resolve_positions(real, position_ids)
        self.frequencies = self.frequencies.to(x.device)
        alike = attention_mask is None and position_ids is None  # in all rows
        angles = self.arch.angles(self.frequencies, positions[:1] if alike else positions, x.dtype)
        frame = {"position_embeddings": angles, "attention_mask": None if visible is None else visible[:, None]}
        layers = iter(self.blocks)

        def run(stack: str, x: Tensor) -> Tensor:
            for _ in range(self.arch.schedule.n_layers(stack)):
                x = next(layers)(x, **frame)
            return x

        e = run(PRELUDE, x)
        x = self.state_init(self._first_state(e, positions))
        loops: Any = self.loop  # LoopBridges by then
        for t in range(self.arch.n_loops):
            x = run(CORE, loops[t].enter(x, e))
            if self.arch.closing and t == self.arch.n_loops - 1:
                x = self.ln_final(x)
            x = loops[t].leave(x)
        x = run(CODA, self.ln_coda(x) if self.arch.norms_before_coda else x)
        if self.arch.head_norm and not self.arch.closing:
            x = self.get_submodule(self.arch.head_norm)(x)
        return self.unembed(x)

    def _first_state(self, e: Tensor, positions: Tensor) -> Tensor:
        given = self.given
        if given is not None:
            given = given.to(positions.device)[positions] if given.ndim == 2 else given
            if given.shape != e.shape:
                raise InputError(
                    f"this view starts from an initial_state of shape {tuple(given.shape)}, and these prompts need "
                    f"{tuple(e.shape)}: make a view for them, or one with a state of [pos, d_model]."
                )
        state, _ = resolve_state(self.arch.cfg, positions, given, self.seed, e.dtype, self.training)
        if state is None:
            return e
        # Gradients come to it also where no weight is trained.
        return state.detach().requires_grad_() if torch.is_grad_enabled() and not state.requires_grad else state


class _Silent(GeneralizedComponent):
    """A component that is no call, and so has no input and output to hook."""

    def __init__(self, name: str, submodules: dict[str, GeneralizedComponent]):
        super().__init__(name, submodules=submodules)
        for point in ("hook_in", "hook_out"):
            delattr(self, point)
            del self._hook_registry[point]


class LoopBridge(_Silent):
    """What a loop has beside its layers: state, injection, closing norm and exit gate."""

    def __init__(self, t: int, arch: Architecture, part: nn.Module, config: TransformerBridgeConfig):
        parts: dict[str, GeneralizedComponent] = {}
        for name in dict(part.named_children()):
            parts[name] = RMSNormalizationBridge(name, config) if name == "ln_loop" else LinearBridge(name)
        super().__init__(str(t), parts)
        optional = {"hook_injection_in": arch.injects, "hook_exit_gate": "exit_gate" in parts}
        points = ["hook_state_pre", "hook_injection", "hook_state_post", *(name for name in optional if optional[name])]
        for point in points:
            setattr(self, point, HookPoint())

    def enter(self, state: Tensor, e: Tensor) -> Tensor:
        """What the first core layer reads."""
        x = self.hook_state_pre(state)
        if hasattr(self, "hook_injection_in"):
            e = self.hook_injection_in(e)
            x = self.injection(torch.cat((x, e), dim=-1)) if "injection" in self.submodules else x + e
        return self.hook_injection(x)

    def leave(self, x: Tensor) -> Tensor:
        """The state, from what the last core layer made."""
        x = self.hook_state_post(self.ln_loop(x) if "ln_loop" in self.submodules else x)
        if "exit_gate" in self.submodules:
            self.hook_exit_gate(self.exit_gate(x).squeeze(-1))
        return x


class Loops(_Silent):
    """All loops: `view.loop[t]`. TransformerLens would count what is in a list, as layers are, as more layers."""

    def __getitem__(self, t: int) -> nn.Module:
        return self.get_submodule(str(range(len(self.submodules))[t]))


class RealisedAdapter(ArchitectureAdapter):
    """TransformerLens's component for every module of `Realised`."""

    supports_kv_cache = False
    supports_hf_output_attentions = False

    def __init__(self, config: TransformerBridgeConfig, arch: Architecture, model: Realised):
        super().__init__(config)
        layer: Any = model.blocks[0]
        self.supports_fold_ln = arch.folding_broken_by() is None
        biased = layer.attn.q.bias is not None
        self.weight_processing_conversions = {**self._qkvo_weight_conversions(include_biases=biased)}
        attn = {part: LinearBridge(part) for part in "qkvo"} | self._norms(layer.attn, "q_norm", "k_norm")
        mlp: dict[str, GeneralizedComponent] = {part: LinearBridge(part) for part in ("gate", "in", "out")}
        names = {"hook_resid_mid": "mid.hook_out"}
        if arch.norms_stream:  # which the norms come after
            names |= {"hook_attn_out": "attn.hook_out", "hook_mlp_out": "mlp.hook_out"}
        parts = {
            **self._norms(layer, *_NORMS),
            "attn": PositionEmbeddingsAttentionBridge("attn", config, attn),
            "mid": GeneralizedComponent("mid"),
            "mlp": GatedMLPBridge("mlp", config, mlp),
        }
        loops: dict[str, GeneralizedComponent] = {
            str(t): LoopBridge(t, arch, part, config) for t, part in enumerate(model.loop)
        }
        self.component_mapping = {
            "embed": EmbeddingBridge("embed"),
            "state_init": GeneralizedComponent("state_init"),
            "blocks": BlockBridge("blocks", submodules=parts, hook_alias_overrides=names),
            "loop": Loops("loop", loops),
            **self._norms(model, "ln_coda", "ln_final", "ln_head"),
            "unembed": UnembeddingBridge("unembed"),
        }

    def _norms(self, module: nn.Module, *names: str) -> dict[str, GeneralizedComponent]:
        return {name: RMSNormalizationBridge(name, self.cfg) for name in names if hasattr(module, name)}
