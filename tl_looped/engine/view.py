"""The realised-depth view: a looped model as one deep transformer, for TransformerLens's own tools.

Layer d of the view is the d-th layer call of a run: prelude, core in every loop, coda. The weights are the looped
model's own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import cached_property
from typing import Any, NoReturn, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformer_lens import ActivationCache, HookedRootModule
from transformer_lens.config import TransformerLensConfig
from transformer_lens.hook_points import LensHandle
from typing_extensions import Unpack

from tl_looped.engine.cache import CachingHooks, Keep, LoopedCache, run_with_cache
from tl_looped.engine.config import LoopedConfig
from tl_looped.engine.engine import Engine, ReturnType
from tl_looped.engine.errors import HookNameError, InputError, nearest
from tl_looped.engine.hooks import Direction, HookFn, HookName, LoopHookPoint
from tl_looped.engine.reach import NamesFilter
from tl_looped.engine.runs import Prompts, Run, RunOptions, with_run_options
from tl_looped.engine.schedule import CORE, HookSite, LoopSchedule
from tl_looped.engine.tokens import Ids
from tl_looped.nn.block import Block

_FINAL_NORM = "ln_final."


class DepthNames:
    """Names of the looped model and of its realised-depth view, each from the other.

    `blocks.{l}.loop.{t}.X` is `blocks.{d}.X`; the norm that closes the last loop is the view's `ln_final` where nothing
    but the head comes after it (Ouro). Sites of the loop itself keep their names.
    """

    def __init__(self, cfg: LoopedConfig, schedule: LoopSchedule):
        self.schedule = schedule
        norm = cfg.head_norm_site(schedule.n_loops() - 1)
        self.closing = None if norm == HookSite(_FINAL_NORM) else norm  # what is the view's ln_final, if not its own

    def to_depth(self, name: str) -> str:
        """The view's name of a looped model's site; a gradient's name works alike."""
        site = HookSite.parse(name)
        if site.stack is not None and site.layer is not None:
            if site.stack == CORE and site.loop is None:
                raise HookNameError(f"{name!r} means every loop: the realised-depth view needs one.")
            return HookSite(site.component, CORE, self.schedule.realised_depth(site.stack, site.layer, site.loop)).name
        norm = self.closing
        if norm is not None and site.loop == norm.loop and site.component.startswith(norm.component):
            return site.component.replace(norm.component, _FINAL_NORM)
        return name

    def to_looped(self, name: str) -> str:
        """The looped model's name of a site of the view."""
        site = HookSite.parse(name)
        if site.stack == CORE and site.layer is not None and site.loop is None:
            if site.layer >= self.schedule.depth:
                raise HookNameError(f"{name!r} does not exist: this view has {self.schedule.depth} layers.")
            stack, layer, loop = self.schedule.at_depth(site.layer)
            return HookSite(site.component, stack, layer, loop).name
        norm = self.closing
        if norm is not None and site.component.startswith(_FINAL_NORM):
            return HookSite(site.component.replace(_FINAL_NORM, norm.component), loop=norm.loop).name
        if site.stack is not None:
            raise HookNameError(
                f"{name!r} is not a name of the realised-depth view, which counts all layers as blocks."
            )
        return name


class DepthHookPoint(LoopHookPoint):
    """What a hook on the view receives: a looped model's hook point, under the view's name and with its depth."""

    __slots__ = ("_site",)

    def __init__(self, name: str, here: LoopHookPoint):
        super().__init__(here.point, here.loop)
        self._site = HookSite.parse(name)

    @property
    def site(self) -> HookSite:
        """Where it is, in the view's count: the layer is the realised depth."""
        return self._site


class UnrolledCache(ActivationCache):
    """An ActivationCache of the view. What adds up the residual stream refuses where the sum does not hold.

    Attributes:
        run: what made it.
    """

    def __init__(self, cache_dict: dict[str, Tensor], model: UnrolledModel, run: Run, has_batch_dim: bool = True):
        super().__init__(cache_dict, model, has_batch_dim)
        self.run = run

    def apply_slice_to_batch_dim(self, batch_slice: Any) -> UnrolledCache:
        """The cache of some rows of the batch, as in TransformerLens."""
        sliced = super().apply_slice_to_batch_dim(batch_slice)
        view: Any = self.model
        return UnrolledCache(sliced.cache_dict, view, self.run, sliced.has_batch_dim)

    def _needs_sum(self, what: str) -> None:
        view: Any = self.model
        reason = view.looped.cfg.sum_broken_by(view.n_loops)
        if reason is None and self.run.state_given:
            reason = "its loops started from a state that was given"
        if reason is not None:
            raise InputError(
                f"{what} adds up what the layers wrote, which is not the residual stream of a {view.looped.cfg.family} "
                f"model: {reason}. Read the states themselves: cache.accumulated_resid or looped.run_with_cache."
            )

    def _needs_head_sum(self, what: str) -> None:
        self._needs_sum(what)
        view: Any = self.model
        reason = view.looped.cfg.heads_mixed_by()
        if reason is not None:
            raise InputError(f"{what} splits attention by head, but {reason} here.")

    def apply_ln_to_stack(self, residual_stack: Tensor, layer: int | None = None, *args: Any, **kwargs: Any) -> Any:
        """As TransformerLens's; before the head, where the head reads through one norm."""
        view: Any = self.model
        reason = view.looped.cfg.readout_broken_by()
        if layer in (None, -1, view.cfg.n_layers) and reason is not None:
            raise InputError(
                f"apply_ln before the head needs the head's norm, but this is a {view.looped.cfg.family} model and "
                f"{reason}. Read states with looped.readout."
            )
        return super().apply_ln_to_stack(residual_stack, layer, *args, **kwargs)

    def decompose_resid(self, *args: Any, **kwargs: Any) -> Any:
        """As TransformerLens's, where the sum holds."""
        self._needs_sum("decompose_resid")
        return super().decompose_resid(*args, **kwargs)

    def get_full_resid_decomposition(self, *args: Any, **kwargs: Any) -> Any:
        """As TransformerLens's, where the sum holds head by head and neuron by neuron."""
        self._needs_head_sum("get_full_resid_decomposition")
        return super().get_full_resid_decomposition(*args, **kwargs)

    def stack_head_results(self, *args: Any, **kwargs: Any) -> Any:
        """As TransformerLens's, where the sum holds head by head."""
        self._needs_head_sum("stack_head_results")
        return super().stack_head_results(*args, **kwargs)

    def stack_neuron_results(self, *args: Any, **kwargs: Any) -> Any:
        """As TransformerLens's, where the sum holds neuron by neuron."""
        self._needs_head_sum("stack_neuron_results")
        return super().stack_neuron_results(*args, **kwargs)


class UnrolledModel(CachingHooks, HookedRootModule):
    """A looped model as a feedforward one of depth p + k·T + c; get it from `LoopedModel.unrolled`.

    It meets TransformerLens's `TransformerLensModel` and `TransformerLensModelWithWeights`: its `patching` module, its
    `ActivationCache` and the tools that use hooks, weights and caches run on it. Hooks live on the looped model.

    Args:
        looped: the model.
        n_loops: loops to unroll.
        initial_state: the state that every run starts from; None for the model's own.
        seed: seed of a drawn state.
    """

    def __init__(self, looped: Engine, n_loops: int, initial_state: Tensor | None = None, seed: int | None = None):
        super().__init__()
        self.looped = looped
        self.n_loops = n_loops
        self.names = DepthNames(looped.cfg, looped.cfg.schedule(n_loops))
        self._state: RunOptions = {"initial_state": initial_state, "seed": seed}
        self.tokenizer = looped.tokenizer
        self.train(looped.training)

    @property
    def cfg(self) -> TransformerLensConfig:
        """TransformerLens's config of the view."""
        cfg = self.looped.cfg
        return TransformerLensConfig(
            d_model=cfg.d_model,
            d_head=cfg.d_head,
            n_layers=self.names.schedule.depth,
            n_ctx=cfg.n_ctx,
            n_heads=cfg.n_heads,
            d_mlp=cfg.d_mlp,
            d_vocab=cfg.d_vocab,
            device=str(self.looped.device),
            positional_embedding_type="standard" if cfg.learned_positions else "rotary",
            n_key_value_heads=cfg.kv_heads if cfg.kv_heads != cfg.n_heads else None,
            gated_mlp=cfg.gated_mlp,
            uses_rms_norm=cfg.norm != "layer",
            eps=cfg.eps,
            act_fn=cfg.act_fn,
            normalization_type="LN" if cfg.norm == "layer" else "RMS",
            final_rms=cfg.norm != "layer",
            dtype=self.looped.dtype,
        )

    # Weights.

    @property
    def blocks(self) -> list[Block]:
        """Layer d of the view is the layer that runs at depth d: the same module in every loop."""
        stacks = {name: getattr(self.looped.transformer, name) for name in self.names.schedule.stacks()}
        return [stacks[stack][layer] for stack, layer, _ in self.names.schedule.layer_calls()]

    @property
    def ln_final(self) -> nn.Module:
        """The norm through which the head reads; for Ouro the one that closes every loop."""
        reason = self.looped.cfg.readout_broken_by()
        if reason is not None:
            raise AttributeError(f"this view has no ln_final: {reason}.")
        return cast(nn.Module, self.looped.transformer.ln_final)

    @property
    def unembed(self) -> nn.Linear:
        """The head."""
        return self.looped.transformer.unembed

    @property
    def W_E(self) -> Float[Tensor, "d_vocab d_model"]:
        """The embedding."""
        return self.looped.W_E

    @property
    def W_U(self) -> Float[Tensor, "d_model d_vocab"]:
        """The unembedding, a view."""
        return self.looped.W_U

    @property
    def b_U(self) -> Float[Tensor, " d_vocab"]:
        """The head has no bias: zeros."""
        return self.W_U.new_zeros(self.W_U.shape[1])

    def accumulated_bias(
        self, layer: int, mlp_input: bool = False, include_mlp_biases: bool = True
    ) -> Float[Tensor, " d_model"]:
        """What biases of attention and MLP have written before a layer, or before its MLP, as in TransformerLens."""
        blocks = self.blocks
        attention = blocks[: layer + mlp_input]
        maps = [block.attn.o for block in attention]
        maps += [block.mlp.down for block in blocks[:layer]] if include_mlp_biases else []
        total = self.W_U.new_zeros(self.W_U.shape[0])
        return sum((one.bias for one in maps if one.bias is not None), start=total)

    def tokens_to_residual_directions(self, tokens: str | int | Tensor) -> Float[Tensor, "*tokens d_model"]:
        """What some tokens' logits read of the residual stream after the final norm's division.

        The unembedding's columns times the norm's weight, as TransformerLens has them once the norm is folded in; so
        `logit_attrs` adds up to the logit.
        """
        ids = self.to_single_token(tokens) if isinstance(tokens, str) else tokens
        if isinstance(ids, Tensor) and ids.numel() == 1:
            ids = int(ids)
        gain = self.looped.transformer.head_gain
        return self.W_U.T[ids] if gain is None else self.W_U.T[ids] * gain

    # Text.

    def to_tokens(self, *args: Any, **kwargs: Any) -> Int[Tensor, "batch pos"]:
        """See `LoopedModel.to_tokens`."""
        return self.looped.to_tokens(*args, **kwargs)

    def to_str_tokens(self, *args: Any, **kwargs: Any) -> list[Any]:
        """See `LoopedModel.to_str_tokens`."""
        return self.looped.to_str_tokens(*args, **kwargs)

    def to_string(self, tokens: Ids) -> str | list[str]:
        """See `LoopedModel.to_string`."""
        return self.looped.to_string(tokens)

    def to_single_token(self, text: str) -> int:
        """See `LoopedModel.to_single_token`."""
        return self.looped.to_single_token(text)

    # Hooks.

    @cached_property
    def hook_dict(self) -> dict[str, Any]:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Every hook point of the view by name. Made when asked for; running with hooks does not need it."""
        points: dict[str, Any] = {}
        for point in self.looped.hook_dict.points():
            for loop in range(self.n_loops) if point.looped else [None]:
                here = LoopHookPoint(point, loop)
                points[self.names.to_depth(here.name)] = here
        return points

    def _looped_hook(self, name: HookName, hook: HookFn) -> tuple[HookName, HookFn]:
        """A hook on the view, as one on the looped model."""

        def renamed(tensor: Tensor, hook: LoopHookPoint, _hook: HookFn = hook) -> Any:
            return _hook(tensor, hook=DepthHookPoint(self.names.to_depth(hook.name), hook))

        if isinstance(name, str):
            looped = self.names.to_looped(name)
            site = HookSite.parse(looped).at(None).name
            if site not in self.looped.hook_dict:
                known = {
                    self.names.to_depth(n) for n in (p.site.at(0 if p.looped else None).name for p in self.points())
                }
                raise HookNameError(f"this view has no hook point {name!r}.{nearest(name, known)}")
            return looped, renamed
        return (lambda looped_name, accepts=name: accepts(self.names.to_depth(looped_name))), renamed

    def points(self) -> list[Any]:
        """The looped model's physical hook points."""
        return self.looped.hook_dict.points()

    @contextmanager
    def hooks(  # pyright: ignore[reportIncompatibleMethodOverride] - immutable defaults
        self,
        fwd_hooks: Iterable[tuple[HookName, HookFn]] = (),
        bwd_hooks: Iterable[tuple[HookName, HookFn]] = (),
        reset_hooks_end: bool = True,
        clear_contexts: bool = False,
    ) -> Iterator[UnrolledModel]:
        """Hooks under the view's names for the length of a `with` block."""
        forward = [self._looped_hook(name, hook) for name, hook in fwd_hooks]
        backward = [self._looped_hook(name, hook) for name, hook in bwd_hooks]
        with self.looped.hooks(forward, backward, reset_hooks_end, clear_contexts):
            yield self

    def add_hook(
        self,
        name: HookName,
        hook: HookFn,
        dir: Direction = "fwd",
        is_permanent: bool = False,
        level: int | None = None,
        prepend: bool = False,
    ) -> None:
        """Register a hook under a name of the view, until `reset_hooks`."""
        self.looped.add_hook(*self._looped_hook(name, hook), dir, is_permanent, level, prepend)

    def reset_hooks(self, *args: Any, **kwargs: Any) -> None:
        """Remove the looped model's hooks, on which those of the view live."""
        self.looped.reset_hooks(*args, **kwargs)

    def remove_all_hook_fns(self, *args: Any, **kwargs: Any) -> None:
        """Remove the looped model's hooks, on which those of the view live."""
        self.looped.remove_all_hook_fns(*args, **kwargs)

    def clear_contexts(self) -> None:
        """Empty the scratch dictionaries of all hook points."""
        self.looped.clear_contexts()

    def list_hooks(self, *args: Any, **kwargs: Any) -> dict[str, list[LensHandle]]:
        """The looped model's hooks, on which those of the view live."""
        return self.looped.list_hooks(*args, **kwargs)

    def set_use_split_qkv_input(self, use_split_qkv_input: bool) -> NoReturn:
        """Refused: the layers have no separate copy of the residual stream for each head's query, key and value."""
        raise InputError(
            "this view has no hook_q_input, hook_k_input, hook_v_input, which TransformerLens's direct path patching "
            "needs: use tl_looped.patching.path_patch, which also reaches across loops."
        )

    # Running.

    @with_run_options
    def forward(
        self,
        input: Prompts,
        *,
        return_type: ReturnType = "logits",
        loss_per_token: bool = False,
        **options: Unpack[RunOptions],
    ) -> Any:
        """As `LoopedModel.forward`, with this view's loops and initial state."""
        run = self.looped.batch(input, self.n_loops, **self._options(options))
        return self.looped.execute(run, return_type, loss_per_token)

    def run_with_hooks(  # pyright: ignore[reportIncompatibleMethodOverride] - immutable defaults
        self,
        *model_args: Any,
        fwd_hooks: Iterable[tuple[HookName, HookFn]] = (),
        bwd_hooks: Iterable[tuple[HookName, HookFn]] = (),
        reset_hooks_end: bool = True,
        clear_contexts: bool = False,
        **model_kwargs: Any,
    ) -> Any:
        """Run once with hooks under the view's names."""
        with self.hooks(fwd_hooks, bwd_hooks, reset_hooks_end, clear_contexts):
            return self(*model_args, **model_kwargs)

    @with_run_options
    def run_with_cache(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        input: Prompts,
        *,
        names_filter: NamesFilter = None,
        pos_slice: Any = None,
        device: torch.device | str | None = None,
        incl_bwd: bool = False,
        remove_batch_dim: bool = False,
        return_type: ReturnType = "logits",
        loss_per_token: bool = False,
        **options: Unpack[RunOptions],
    ) -> tuple[Any, UnrolledCache]:
        """Run, and keep activations under the view's names; the rest as `LoopedModel.run_with_cache`."""
        run = self.looped.batch(input, self.n_loops, **self._options(options))
        keep = Keep(self._looped_filter(names_filter), None, pos_slice, device, incl_bwd, remove_batch_dim)
        output, cache = run_with_cache(self.looped, run, keep, return_type, loss_per_token)
        return output, self.view(cache)

    def view(self, cache: LoopedCache) -> UnrolledCache:
        """A looped model's cache under the view's names, sharing its tensors."""
        if cache.run.n_loops != self.n_loops:
            raise InputError(f"the cache is of {cache.run.n_loops} loops, the view of {self.n_loops}.")
        renamed = {self.names.to_depth(name): tensor for name, tensor in cache.cache_dict.items()}
        return UnrolledCache(renamed, self, cache.run, cache.has_batch_dim)

    def _looped_filter(self, names_filter: NamesFilter) -> NamesFilter:
        if names_filter is None:
            return None
        if isinstance(names_filter, str):
            return self.names.to_looped(names_filter)
        if callable(names_filter):
            accepts: Callable[[str], bool] = names_filter
            return lambda name: accepts(self.names.to_depth(name))
        return [self.names.to_looped(name) for name in names_filter]

    def _options(self, options: RunOptions) -> RunOptions:
        return {**self._state, **options}
