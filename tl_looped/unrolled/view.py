"""UnrolledModel: the realised-depth view itself, and its cache."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Mapping
from functools import wraps
from typing import Any, NoReturn, cast

import torch
from torch import Tensor
from transformer_lens import ActivationCache
from transformer_lens.model_bridge import TransformerBridge
from transformer_lens.model_bridge.sources._bridge_builder import detect_tokenizer_bos_eos

from tl_looped.engine.cache import LoopedCache
from tl_looped.engine.checks import check_eval
from tl_looped.engine.engine import Engine
from tl_looped.engine.errors import InputError
from tl_looped.engine.network import Network
from tl_looped.engine.schedule import LoopCount
from tl_looped.unrolled.architecture import Architecture
from tl_looped.unrolled.names import DepthNames
from tl_looped.unrolled.realised import Realised, RealisedAdapter


class _NoMapError(InputError, TypeError):  # TransformerLens looks at every attribute, and passes over such errors
    """A weight is asked for that is no map of the residual stream."""


def _adds_up(name: str, *broken_by: Callable[[Architecture], str | None]) -> Callable[..., Any]:
    """A method of ActivationCache that refuses where the sum that it assumes does not hold, or what else it needs."""
    method = getattr(ActivationCache, name)

    @wraps(method)
    def call(self: UnrolledCache, *args: Any, **kwargs: Any) -> Any:
        self.model.needs_sum(name, *broken_by)
        return method(self, *args, **kwargs)

    return call


class UnrolledCache(ActivationCache):
    """An ActivationCache of the view. What adds up the residual stream refuses where the sum does not hold."""

    model: Any

    decompose_resid = _adds_up("decompose_resid")
    logit_attrs = _adds_up(
        "logit_attrs", Architecture.readout_broken_by, Architecture.capped_by, Architecture.folding_broken_by
    )
    get_full_resid_decomposition = _adds_up("get_full_resid_decomposition", Architecture.heads_mixed_by)
    stack_head_results = _adds_up("stack_head_results", Architecture.heads_mixed_by)
    stack_neuron_results = _adds_up("stack_neuron_results", Architecture.heads_mixed_by)

    def apply_slice_to_batch_dim(self, batch_slice: Any) -> UnrolledCache:
        """The cache of some rows of the batch, as in TransformerLens."""
        sliced = super().apply_slice_to_batch_dim(batch_slice)
        return UnrolledCache(sliced.cache_dict, self.model, sliced.has_batch_dim)

    def apply_ln_to_stack(self, residual_stack: Tensor, layer: int | None = None, *args: Any, **kwargs: Any) -> Any:
        """As TransformerLens's; before the head, where the head reads through one norm."""
        reason = self.model.arch.readout_broken_by()
        if layer in (None, -1, self.model.cfg.n_layers) and reason is not None:
            self.model.refuse("apply_ln before the head needs the head's norm", reason, "looped.readout of states")
        return super().apply_ln_to_stack(residual_stack, layer, *args, **kwargs)


class UnrolledModel(TransformerBridge):
    """A looped model as a TransformerBridge of depth p + k·T + c; get it from `LoopedModel.unrolled`.

    Layer d is the d-th layer call of a run: prelude, core in every loop, coda. It has hook points of its own and the
    looped model's Parameters: training, moving or editing the weights of one changes the other; what processes weights
    (`enable_compatibility_mode`) makes new ones and leaves the looped model's alone. Hooks of one do not act in the
    other, and loop count and initial state are fixed. A weight that is replaced in either, and not written, is no
    longer shared (`load_state_dict(assign=True)`, adapters put in later): make the view anew. A copy (`copy.deepcopy`)
    is a view of a copy of the looped model.

    A tool of TransformerLens that assumes what a loop breaks (the residual stream as the sum of what layers write)
    raises InputError with the reason, and names what to call instead.

    Args:
        looped: the model.
        n_loops: loops to unroll.
        initial_state: the state that every run starts from; None for the model's own.
        seed: seed of a drawn state.

    Attributes:
        looped: the model.
        arch: what it is made of.
        names: from the looped model's names of sites to the view's, and back.
    """

    looped: Engine
    arch: Architecture
    names: DepthNames
    state_given: bool

    def __init__(
        self, looped: Engine, n_loops: LoopCount, initial_state: Tensor | None = None, seed: int | None = None
    ):
        check_eval(looped)
        first = [] if looped.cfg.puzzles is None else looped.cfg.puzzle_tokens(0)
        shape = (1, *initial_state.shape[:-1])[-2:] if isinstance(initial_state, Tensor) else (1, len(first) or 1)
        options: dict[str, Any] = {"initial_state": initial_state, "seed": seed, "attention_mask": torch.ones(shape)}
        options |= {"prefix_length": 0} if looped.cfg.prefix_lm else {}
        tokens = torch.zeros(shape, dtype=torch.long)
        tokens[:, : len(first)] = torch.tensor(first)[: shape[1]]
        looped.prepare(tokens, n_loops, **options)  # for its errors
        if looped.cfg.prefix_lm:
            warnings.warn(
                f"{looped.cfg.model_name} was trained with a prefix whose tokens see each other in both directions, "
                "and its view runs causally: pass attention_mask= of [batch, query, key] to say who sees whom.",
                stacklevel=3,
            )
        arch = Architecture(looped.cfg, n_loops)
        model = Realised(cast(Network, looped.transformer), arch, initial_state, seed).eval()
        config, tokenizer = arch.bridge_config(looped.device, looped.dtype), copy.deepcopy(looped.tokenizer)
        if tokenizer is not None:  # text is read as the looped model reads it
            config.tokenizer_prepends_bos, config.tokenizer_appends_eos = detect_tokenizer_bos_eos(tokenizer)
            config.default_prepend_bos = config.tokenizer_prepends_bos
            tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
        self.__dict__["hook_aliases"] = {**self.hook_aliases, **arch.points}
        super().__init__(model, RealisedAdapter(config, arch, model), tokenizer)
        model.connect()
        names = DepthNames(arch, looped.hook_dict, self.hook_dict)
        self.__dict__.update(looped=looped, arch=arch, names=names, state_given=initial_state is not None)

    @property
    def n_loops(self) -> int:
        """How many loops were unrolled."""
        return self.arch.n_loops

    # Where a loop breaks what a tool assumes.

    def refuse(self, what: str, reason: str, instead: str) -> NoReturn:
        """Raise for a tool that would give wrong numbers here."""
        raise InputError(f"{what}, but this is a {self.arch.cfg.family} model: {reason}. Use {instead}.")

    def needs_sum(self, what: str, *broken_by: Callable[[Architecture], str | None], instead: str = "") -> None:
        """Raise unless the residual stream is the sum of what layers write, and nothing else breaks a tool."""
        given = "its loops started from a state that was given" if self.state_given else None
        for reason in (self.arch.sum_broken_by(), given, *(broken(self.arch) for broken in broken_by)):
            if reason is not None:
                instead = instead or "the states themselves (cache.accumulated_resid, looped.run_with_cache)"
                self.refuse(f"{what} adds up what the parts of a model write", reason, instead)

    def enable_compatibility_mode(  # pyright: ignore[reportIncompatibleMethodOverride] - the rest is passed on
        self, disable_warnings: bool = False, no_processing: bool = False, fold_ln: bool = True, **options: Any
    ) -> None:
        """As TransformerLens's, on weights of the view's own; what would change the model's output is refused."""
        if not no_processing:
            self._check_processing(fold_ln=fold_ln, **options)
        super().enable_compatibility_mode(disable_warnings, no_processing, fold_ln, **options)

    def process_weights(  # pyright: ignore[reportIncompatibleMethodOverride] - the rest is passed on
        self, verbose: bool = False, **options: Any
    ) -> None:
        """As TransformerLens's; what would change the model's output is refused."""
        self._check_processing(**options)
        super().process_weights(verbose, **options)

    def _check_processing(self, refactor_factored_attn_matrices: bool = False, **asked: bool) -> None:
        arch = self.arch
        kinds = {
            "fold_ln": ("folds norms into what reads them", arch.folding_broken_by()),
            "center_writing_weights": ("takes the mean out of what is written", arch.centring_broken_by()),
            "center_unembed": ("takes the mean out of the logits", arch.capped_by()),
        }
        for option, (what, reason) in kinds.items():
            if asked.get(option, True) and reason is not None:
                self.refuse(f"processing weights {what}", reason, f"{option}=False")

    def set_use_split_qkv_input(self, use_split_qkv_input: bool) -> None:
        """As TransformerLens's, where the sum holds: direct path patching and edge attribution are built on it."""
        if use_split_qkv_input:
            instead = "tl_looped.patching.path_patch, which reaches across loops"
            self.needs_sum("split q, k, v input", Architecture.split_broken_by, instead=instead)
        super().set_use_split_qkv_input(use_split_qkv_input)

    def set_use_attn_in(self, use_attn_in: bool) -> None:
        """As TransformerLens's, where nothing else reads what queries, keys and values read."""
        reason = self.arch.split_broken_by()
        if use_attn_in and reason is not None:
            self.refuse("use_attn_in gives every head an input of its own", reason, "tl_looped.patching.path_patch")
        super().set_use_attn_in(use_attn_in)

    def loss_fn(self, *args: Any, **kwargs: Any) -> Any:
        """As TransformerLens's, for models that read from left to right."""
        self.arch.cfg.check_causal("the loss of the next token")
        return super().loss_fn(*args, **kwargs)

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """As TransformerLens's, for models that read from left to right."""
        self.arch.cfg.check_causal("generating text")
        return super().generate(*args, **kwargs)

    def generate_stream(self, *args: Any, **kwargs: Any) -> Any:
        """As TransformerLens's, for models that read from left to right."""
        self.arch.cfg.check_causal("generating text")
        return super().generate_stream(*args, **kwargs)

    def all_composition_scores(self, mode: str) -> Any:
        """As TransformerLens's, where a later head reads what an earlier one writes."""
        self.needs_sum("all_composition_scores", Architecture.heads_mixed_by)
        return super().all_composition_scores(mode)

    def forward(self, *args: Any, start_at_layer: int | None = None, **kwargs: Any) -> Any:
        """As TransformerLens's; `start_at_layer` is refused where later loops read more than the residual stream."""
        if start_at_layer is not None:
            depth = start_at_layer + (len(self.blocks) if start_at_layer < 0 else 0)
            if depth < self.arch.first_start():
                reason = "the rest of a run reads more than that"
                instead = "looped(tokens, start_at_loop=..., initial_state=...)"
                self.refuse(f"start_at_layer={start_at_layer} goes on from a residual stream alone", reason, instead)
            kwargs["start_at_layer"] = start_at_layer
        return super().forward(*args, **kwargs)

    def load_state_dict(self, state_dict: Mapping[str, Tensor], strict: bool = True, assign: bool = False) -> Any:
        """Write weights into the shared Parameters, so into the looped model too.

        Raises:
            InputError: two copies of one layer differ, or `assign`, which would end the sharing.
        """
        if assign:
            raise InputError("a view shares the looped model's Parameters: leave out assign, and they are written.")
        first: dict[int, str] = {}
        for name, own in self.state_dict(keep_vars=True).items():
            other = first.setdefault(id(own), name) if name in state_dict else name
            if not torch.equal(state_dict.get(name, own), state_dict.get(other, own)):
                raise InputError(f"{other!r} and {name!r} are one weight of the looped model: make them equal.")
        return super().load_state_dict(dict(state_dict), strict)

    @property
    def W_U(self) -> Tensor:
        """As TransformerLens's, where the head reads the residual stream."""
        self._needs_head_map("W_U maps")
        return super().W_U

    def tl_parameters(self) -> dict[str, Tensor]:
        """As TransformerLens's, where the head reads the residual stream."""
        self._needs_head_map("W_U is among the weights that map")
        return super().tl_parameters()

    def _needs_head_map(self, what: str) -> None:
        if self.arch.cfg.head_transform:
            family, reason = self.arch.cfg.family, self.arch.readout_broken_by()
            raise _NoMapError(f"{what} the residual stream to logits, but this is a {family} model: {reason}.")

    # Caching.

    def run_with_cache(self, *args: Any, **kwargs: Any) -> Any:
        """As TransformerLens's; the cache refuses sums that do not hold."""
        output, cache = super().run_with_cache(*args, **kwargs)
        if isinstance(cache, ActivationCache):
            cache = UnrolledCache(cache.cache_dict, self, cache.has_batch_dim)
        return output, cache

    def view(self, cache: LoopedCache) -> UnrolledCache:
        """A looped model's cache under the view's names, sharing its tensors."""
        arch, run = self.arch, cache.run
        if (run.n_loops, run.l_cycles, run.state_given) != (arch.n_loops, arch.l_cycles, self.state_given):
            theirs, ours = (" from a given state" * given for given in (run.state_given, self.state_given))
            counts = arch.n_loops if arch.l_cycles is None else (arch.n_loops, arch.l_cycles)
            raise InputError(
                f"the cache is of {run.counts} loops{theirs}, the view of {counts}{ours}: make a view like the run."
            )
        renamed = {self.names.to_depth(name): tensor for name, tensor in cache.cache_dict.items()}
        return UnrolledCache(renamed, self, cache.has_batch_dim)
