"""The weights of a model under TransformerLens's names, and how heads compose within a loop and across loops."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformer_lens import FactoredMatrix
from transformer_lens.utilities.matrix import composition_scores

from tl_looped.engine.engine import Engine
from tl_looped.engine.errors import InputError, check_count
from tl_looped.engine.network import matrix
from tl_looped.engine.schedule import CODA, CORE, FAST, PRELUDE, SLOW
from tl_looped.nn.block import Block
from tl_looped.nn.injection import DiagonalInjection
from tl_looped.nn.norm import CentredNorm, Norm
from tl_looped.nn.transformer import LoopedTransformer

_SHORT = {PRELUDE: "P", CORE: "L", CODA: "C", FAST: "L", SLOW: "H"}
Map = Float[Tensor, "d_model d_model"]


class HasWeights(Engine):
    """An engine whose weights have TransformerLens's names and shapes.

    A layer counts once, however often it runs: `cfg.layers()` lists them, prelude, core, coda, and so does the first
    axis of every stack of weights. (A layer that is another's again, as in MobileLLM and TRM, has a place too.) They
    are copies with gradients: what is written into `model.W_Q` changes nothing, what is written into
    `model.blocks[0].attn.W_Q` (a view) changes the model. Norms are not folded in.
    """

    @property
    def blocks(self) -> nn.ModuleList:
        """The core's layers; each has `attn` and `mlp` with their weights. Hook points are in `hook_dict`, by loop."""
        return self._stack(CORE)

    @property
    def prelude(self) -> nn.ModuleList:
        """The layers before the loops."""
        return self._stack(PRELUDE)

    @property
    def coda(self) -> nn.ModuleList:
        """The layers after the loops."""
        return self._stack(CODA)

    def _stack(self, name: str) -> nn.ModuleList:
        found = getattr(self.transformer, name, None)
        if not isinstance(found, nn.ModuleList):
            stacks = " and ".join(f"model.transformer.{stack}" for stack in self.cfg.looping)
            raise InputError(f"this model has no one core: its stacks of layers are {stacks}.")
        return found

    def layer_modules(self) -> list[Block]:
        """Every layer once, in the order of `cfg.layers()`."""
        found = [self.transformer.get_submodule(f"{stack}.{layer}") for stack, layer in self.cfg.layers()]
        return [block for block in found if isinstance(block, Block)]

    def _stacked(self, read: Callable[[Block], Tensor]) -> Tensor:
        return torch.stack([read(block) for block in self.layer_modules()])

    def _bias(self, read: Callable[[Block], nn.Linear], n_heads: int | None = None) -> Tensor:
        """The bias of a map in every layer, zeros where it has none."""

        def one(block: Block) -> Tensor:
            linear = read(block)
            bias = linear.bias if linear.bias is not None else torch.zeros_like(linear.weight[:, 0])
            return bias if n_heads is None else bias.unflatten(0, (n_heads, -1))

        return self._stacked(one)

    @property
    def W_Q(self) -> Float[Tensor, "layer head d_model d_head"]:
        """Query weights."""
        return self._stacked(lambda block: block.attn.W_Q)

    @property
    def W_K(self) -> Float[Tensor, "layer kv_head d_model d_head"]:
        """Key weights, by key-value head."""
        return self._stacked(lambda block: block.attn.W_K)

    @property
    def W_V(self) -> Float[Tensor, "layer kv_head d_model d_head"]:
        """Value weights, by key-value head."""
        return self._stacked(lambda block: block.attn.W_V)

    @property
    def W_O(self) -> Float[Tensor, "layer head d_head d_model"]:
        """Output weights."""
        return self._stacked(lambda block: block.attn.W_O)

    @property
    def W_in(self) -> Float[Tensor, "layer d_model d_mlp"]:
        """What the MLP reads with; beside a gate, the branch without the activation function."""
        return self._stacked(lambda block: block.mlp.W_in)

    @property
    def W_gate(self) -> Float[Tensor, "layer d_model d_mlp"] | None:
        """The gate's weights; None where MLPs have no gate."""
        return self._stacked(lambda block: block.mlp.W_gate) if self.cfg.gated_mlp else None

    @property
    def W_out(self) -> Float[Tensor, "layer d_mlp d_model"]:
        """What the MLP writes with."""
        return self._stacked(lambda block: block.mlp.W_out)

    @property
    def b_Q(self) -> Float[Tensor, "layer head d_head"]:
        """Query biases, zeros where there are none, as are all `b_`."""
        return self._bias(lambda block: block.attn.q, self.cfg.n_heads)

    @property
    def b_K(self) -> Float[Tensor, "layer kv_head d_head"]:
        """Key biases."""
        return self._bias(lambda block: block.attn.k, self.cfg.kv_heads)

    @property
    def b_V(self) -> Float[Tensor, "layer kv_head d_head"]:
        """Value biases."""
        return self._bias(lambda block: block.attn.v, self.cfg.kv_heads)

    @property
    def b_O(self) -> Float[Tensor, "layer d_model"]:
        """Biases of what attention writes."""
        return self._bias(lambda block: block.attn.o)

    @property
    def b_in(self) -> Float[Tensor, "layer d_mlp"]:
        """Biases of what the MLP reads with."""
        return self._bias(lambda block: block.mlp.up)

    @property
    def b_out(self) -> Float[Tensor, "layer d_model"]:
        """Biases of what the MLP writes."""
        return self._bias(lambda block: block.mlp.down)

    @property
    def W_pos(self) -> Float[Tensor, "n_ctx d_embed"]:
        """Learned position vectors.

        Raises:
            InputError: this model turns queries and keys by position instead, or has no positions.
        """
        if not self.cfg.learned_positions:
            raise InputError("this model has no W_pos: its positions are rotary, or it has none (cfg.rotary).")
        return matrix(self.transformer.get_submodule("pos_embed"), "pos_embed")

    @property
    def b_U(self) -> Float[Tensor, " d_vocab"]:
        """The head's bias, zeros where it has none."""
        bias = self.transformer.unembed.bias
        return bias if bias is not None else torch.zeros_like(self.transformer.unembed.weight[:, 0])

    @property
    def QK(self) -> FactoredMatrix:
        """W_Q W_Kᵀ of every layer and head, [layer, head, d_model, d_model]; rotary and q/k norms are left out."""
        return FactoredMatrix(self.W_Q, self._for_queries(self.W_K).mT)

    @property
    def OV(self) -> FactoredMatrix:
        """W_V W_O of every layer and head, [layer, head, d_model, d_model]."""
        return FactoredMatrix(self._for_queries(self.W_V), self.W_O)

    def _for_queries(
        self, weights: Float[Tensor, "layer kv_head d_model d_head"]
    ) -> Float[Tensor, "layer head d_model d_head"]:
        """Every key-value head once for each query head that reads it."""
        return weights.repeat_interleave(self.cfg.n_heads // self.cfg.kv_heads, dim=1)

    @property
    def all_head_labels(self) -> list[str]:
        """A label for each head of each layer: L0H1 in the core, P0H1 in the prelude, C0H1 in the coda.

        With two stacks L0H1 is of L_blocks and H0H1 of H_blocks.
        """
        return [f"{_SHORT[stack]}{layer}H{h}" for stack, layer in self.cfg.layers() for h in range(self.cfg.n_heads)]

    @property
    def n_params_total(self) -> int:
        """Parameters, each once: a layer that loops, and a head that is tied, add nothing."""
        return sum(weight.numel() for weight in self.parameters())

    def tokens_to_residual_directions(self, tokens: str | int | Tensor) -> Float[Tensor, "*tokens d_model"]:
        """Columns of W_U: what the last norm's output is multiplied by for a token's logit. The norm is not folded in.

        Args:
            tokens: a token as text or id, or ids of any shape.
        """
        ids = self.to_single_token(tokens) if isinstance(tokens, str) else tokens
        return self.W_U.T[ids]

    # Composition.

    def all_composition_scores(
        self, mode: Literal["Q", "K", "V"], loops_apart: int = 0
    ) -> Float[Tensor, "layer head layer head"]:
        """How much of what each head writes another head reads: ‖OV · M · R‖ / (‖OV‖ ‖M · R‖), Frobenius norms.

        R is the reader's circuit (Q: QK, K: QKᵀ, V: OV), and M all that lies on the stream between: the weights of
        norms on it (sandwich norms, those that close loops), the injection's map of the state or of the prelude's
        output, the reader's own norm. Folded in: weights of norms, linear maps. Left out, as TransformerLens leaves
        them out: what norms divide by, rotary, norms and biases of q and k. With weights of norms at 1 and no
        injection, a loop's own scores are TransformerLens's of that block.

        Args:
            mode: what is read.
            loops_apart: 0: reader and writer in the same loop (from prelude to core: by the injection, or without one
                into loop 0; from core to coda: of the last loop). From 1 on: the writer's loop is so many before the
                reader's; both in the core.

        Returns:
            Of writer (layer, head) and reader (layer, head), layers as in `cfg.layers()`, heads as in
            `all_head_labels`; 0 where the writer does not come before the reader, and NaN from prelude to coda, as
            those paths go through every loop and no one map is theirs.

        Raises:
            InputError: another mode, or a model in which what lies between is no linear map (two stacks, gated
                updates, gates on heads, layers that the loop's time modulates).

        Source:
            transformer-circuits.pub/2021/framework. The paths across loops are this library's.

        Example:
            scores = model.all_composition_scores("K", loops_apart=1)
            writer, reader = divmod(int(scores.nan_to_num().argmax()), scores[0, 0].numel())
        """
        if mode not in ("Q", "K", "V"):
            raise InputError(f"mode must be 'Q', 'K' or 'V', got {mode!r}.")
        check_count("loops_apart", loops_apart, minimum=0)
        stream = _Stream(self)
        layers, blocks = self.cfg.layers(), self.layer_modules()
        W_Q, W_K, W_V = self.W_Q, self._for_queries(self.W_K), self._for_queries(self.W_V)
        scores = W_Q.new_zeros(len(layers), self.cfg.n_heads, len(layers), self.cfg.n_heads)
        for i, writer in enumerate(blocks):
            left = FactoredMatrix(W_V[i], writer.attn.W_O @ _after(writer))
            for j, reader in enumerate(blocks):
                if loops_apart == 0 and (layers[i][0], layers[j][0]) == (PRELUDE, CODA):
                    scores[i, :, j] = torch.nan
                    continue
                between = stream.between(layers[i], layers[j], loops_apart)
                if between is None:
                    continue
                own = _fold(reader.ln1) if reader.before else _eye(self)
                seen = between @ own
                right = {
                    "Q": FactoredMatrix(seen @ W_Q[j], (own @ W_K[j]).mT),
                    "K": FactoredMatrix(seen @ W_K[j], (own @ W_Q[j]).mT),
                    "V": FactoredMatrix(seen @ W_V[j], reader.attn.W_O),
                }[mode]
                scores[i, :, j] = composition_scores(left, right, broadcast_dims=True)
        return scores


def _eye(model: Engine) -> Map:
    return torch.eye(model.cfg.d_model, device=model.device, dtype=model.dtype)


def _fold(norm: Norm) -> Map:
    """A norm without what it divides by, as x ↦ x @ this."""
    weight, gain = next(norm.parameters(), None), norm.gain()
    size = {} if weight is None else {"device": weight.device, "dtype": weight.dtype}
    found = torch.eye(norm.size, **size)
    if isinstance(norm, CentredNorm):
        found = found - 1 / norm.size
    return found if gain is None else found * gain.to(found.dtype)


def _after(block: Block) -> Map:
    """The norm on what a layer's attention writes."""
    if block.after:
        return _fold(block.ln1_post)
    W_O = block.attn.W_O
    return torch.eye(W_O.shape[-1], device=W_O.device, dtype=W_O.dtype)


class _Stream:
    """What the residual stream goes through between two layers, in a model whose stream is mapped linearly."""

    def __init__(self, model: HasWeights):
        cfg, network = model.cfg, model.transformer
        broken = {
            "two stacks loop": cfg.two_states is not None,
            "a gate decides how far a loop moves the state": cfg.loop_update == "gated",
            "gates multiply what heads write": cfg.attn_gate,
            "the loop's time modulates what layers read": cfg.loop_time,
            "a loop keeps a part of the state beside what its norms and injection make of it": (
                cfg.loop_update in ("damped", "residual")
                and (cfg.injection != "none" or cfg.norm_placement in ("residual_sandwich", "post"))
            ),
        }
        reasons = [reason for reason, is_so in broken.items() if is_so]
        if reasons or not isinstance(network, LoopedTransformer):
            raise InputError(
                f"no composition scores of this model, as what lies between two heads is no linear map: "
                f"{', '.join(reasons)}. Edit a head's output and see what changes: tl_looped.patching.path_patch."
            )
        self.cfg, self.network, self.eye = cfg, network, _eye(model)

    def between(self, writer: tuple[str, int], reader: tuple[str, int], loops_apart: int) -> Map | None:
        """From what the writer's attention adds to what the reader's norm reads; None where no path leads there."""
        (a, i), (b, j) = writer, reader
        if a == b and loops_apart == 0:
            return self._layers(a, range(i, j)) if i < j else None
        if loops_apart:
            if not a == b == CORE:
                return None
            found = self._layers(CORE, range(i, self.cfg.n_core)) @ self._closed() @ self._entered()
            whole = self._layers(CORE, range(self.cfg.n_core)) @ self._closed() @ self._entered()
            for _ in range(loops_apart - 1):
                found = found @ whole
            return found @ self._layers(CORE, range(j))
        if (a, b) == (PRELUDE, CORE):
            return self._layers(PRELUDE, range(i, self.cfg.n_prelude)) @ self._injected() @ self._layers(CORE, range(j))
        if (a, b) == (CORE, CODA):
            return (
                self._layers(CORE, range(i, self.cfg.n_core))
                @ self._closed()
                @ self._left()
                @ self._layers(CODA, range(j))
            )
        return None

    def _layers(self, stack: str, layers: Iterable[int]) -> Map:
        """The norms on the stream of these layers; of the first, those that come after its attention."""
        found = self.eye
        for layer in layers:
            block = self.network.get_submodule(f"{stack}.{layer}")
            if isinstance(block, Block) and block.on_stream:
                found = found @ _fold(block.ln1_post) @ _fold(block.ln2_post)
        return found

    def _closed(self) -> Map:
        if not self.cfg.norms_each_loop:
            return self.eye
        return _fold(self.network.ln_loop if self.cfg.loop_norm == "own" else self.network.ln_final)

    def _entered(self) -> Map:
        """The injection's map of the state."""
        d, kind = self.cfg.d_model, self.cfg.injection
        injection = getattr(self.network, "injection", None)
        if isinstance(injection, DiagonalInjection):
            return torch.diag(injection.decay())
        if not isinstance(injection, nn.Linear):
            return self.eye
        weight = matrix(injection, "injection")
        return (weight[:, :d] if kind == "concat_linear" else weight[:, d:]).T

    def _injected(self) -> Map:
        """From the prelude's last layer to what layer 0 of the core reads."""
        d, kind = self.cfg.d_model, self.cfg.injection
        found = _fold(self.network.ln_prelude) if self.cfg.prelude_norm else self.eye
        injection = getattr(self.network, "injection", None)
        if isinstance(injection, DiagonalInjection):
            return found @ (injection.input.weight.T * injection.step())
        if not isinstance(injection, nn.Linear):
            return found
        weight = matrix(injection, "injection")
        return found @ (weight[:, d:] if kind == "concat_linear" else weight[:, :d]).T

    def _left(self) -> Map:
        """From the last loop to what the coda reads."""
        found = self.eye if self.network.after_loops is None else self.network.after_loops.T
        return found @ _fold(self.network.ln_final) if self.cfg.norms_last_loop else found
