"""LoopedModel: what a user holds."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformer_lens import HookedRootModule
from transformer_lens.utilities.lm_utils import lm_cross_entropy_loss
from transformer_lens.utilities.slice import Slice
from transformers import PreTrainedTokenizerBase

from tl_looped.adapters import loading
from tl_looped.engine.cache import CacheWriter, LoopedCache
from tl_looped.engine.config import LoopedConfig
from tl_looped.engine.errors import InputError
from tl_looped.engine.hooks import Direction, HookDict, HookFn, HookName
from tl_looped.engine.reach import NamesFilter, Reach
from tl_looped.engine.runs import (
    Run,
    check_tokens,
    padding_mask,
    resolve_loops,
    resolve_positions,
    resolve_state,
    visibility,
)
from tl_looped.engine.schedule import HookSite, LoopSchedule
from tl_looped.engine.tokens import PaddingSide, single_token, tokenize
from tl_looped.engine.view import UnrolledModel
from tl_looped.generation import Generated, TokenStream, generate, generate_stream
from tl_looped.nn import Frame, LoopedTransformer

ReturnType = Literal["logits", "loss", "both"] | None
Self = TypeVar("Self", bound="LoopedModel")


class LoopedModel(HookedRootModule):
    """A looped language model with a hook point at every activation of every loop.

    Make one with `from_pretrained` or `from_config`. It is TransformerLens's HookedRootModule with names that have the
    loop in them (`tl_looped.engine.schedule`), and every run takes:

    - `n_loops`: how many loops; by default as many as the model was trained with.
    - `initial_state`, `seed`: the state that enters the first loop, or the seed that draws it. A model that draws
      its state (Huginn) uses seed 0 unless told otherwise, so runs repeat; in `train()` mode it draws afresh.
    - `start_at_loop`, `stop_at_loop`: run a part; negative numbers count from the end.

    Args:
        transformer: the native model.
        tokenizer: a tokenizer of transformers, or None for token ids only.
    """

    hook_dict: HookDict

    def __init__(self, transformer: LoopedTransformer, tokenizer: PreTrainedTokenizerBase | None = None):
        super().__init__()
        self.cfg: LoopedConfig = transformer.cfg
        self.transformer = transformer
        self.tokenizer = tokenizer
        self.setup()

    def setup(self) -> None:
        """List the hook points by name."""
        self.hook_dict = self.transformer.hook_dict  # pyright: ignore[reportIncompatibleVariableOverride]
        self.mod_dict = {**dict(self.transformer.named_modules()), **self.hook_dict}

    # Making and keeping models.

    @classmethod
    def from_config(
        cls: type[Self],
        cfg: LoopedConfig,
        seed: int = 0,
        tokenizer: PreTrainedTokenizerBase | None = None,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> Self:
        """A model with random weights from a seed; see `LoopedTransformer.reset_parameters`."""
        transformer = LoopedTransformer(cfg)
        transformer.reset_parameters(seed)
        return cls(transformer.to(device=device, dtype=dtype), tokenizer).eval()

    @classmethod
    def from_pretrained(
        cls: type[Self],
        name: str | Path,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        revision: str | None = None,
    ) -> Self:
        """Load a checkpoint whole and exactly, without running code from it.

        Args:
            name: a hub id ("ByteDance/Ouro-1.4B"), a folder, or an embedded model ("looped-hops",
                "looped-hops-settling").
            device: where to put it; None: a GPU where there is one.
            dtype: of the weights; None: as stored.
            tokenizer: instead of the checkpoint's own.
            revision: branch, tag or commit on the hub.

        Raises:
            LoadError: an unknown family, a config value that is not implemented, a missing, extra or misshapen weight,
                a pickled checkpoint, or a name that is neither.
        """
        folder = loading.find(name, revision)
        place = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        transformer = loading.load(folder, str(name), place, dtype)
        return cls(transformer, tokenizer or loading.load_tokenizer(folder)).eval()

    def save_pretrained(self, folder: str | Path) -> None:
        """Write config, weights and tokenizer in tl_looped's own format; `from_pretrained(folder)` reads it back."""
        loading.save(self.transformer, self.tokenizer, Path(folder))

    # What it is.

    @property
    def schedule(self) -> LoopSchedule:
        """Which layer runs when, at the loop count the model was trained with; `cfg.schedule(n)` for another."""
        return self.cfg.schedule()

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.transformer.embed.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """Number format of the weights."""
        return self.transformer.embed.weight.dtype

    @property
    def W_E(self) -> Float[Tensor, "d_vocab d_model"]:
        """The embedding."""
        return self.transformer.embed.weight

    @property
    def W_U(self) -> Float[Tensor, "d_model d_vocab"]:
        """The unembedding, a view."""
        return self.transformer.unembed.weight.T

    # Text.

    def to_tokens(
        self,
        text: str | list[str],
        prepend_bos: bool | None = None,
        padding_side: PaddingSide | None = None,
    ) -> Int[Tensor, "batch pos"]:
        """Token ids on the model's device; see `engine.tokens.tokenize`. Text that is too long is an error."""
        tokens, _ = tokenize(self.tokenizer, text, prepend_bos, padding_side)
        return check_tokens(tokens, self.cfg).to(self.device)

    def to_string(self, tokens: Tensor) -> str | list[str]:
        """Text of token ids: a string for [pos], a list for [batch, pos]."""
        if self.tokenizer is None:
            raise InputError("this model has no tokenizer, so it can't write text: set model.tokenizer.")
        return self.tokenizer.batch_decode(tokens) if tokens.ndim == 2 else self.tokenizer.decode(tokens)

    def to_str_tokens(self, text: str | Tensor, prepend_bos: bool | None = None) -> list[str]:
        """The text of each token of one prompt."""
        tokens = self.to_tokens(text, prepend_bos)[0] if isinstance(text, str) else text.flatten()
        if self.tokenizer is None:
            raise InputError("this model has no tokenizer, so it can't write text: set model.tokenizer.")
        return [str(self.tokenizer.decode([token])) for token in tokens.tolist()]

    def to_single_token(self, text: str) -> int:
        """The id of a text that is one token, or an error that shows its tokens."""
        return single_token(self.tokenizer, text)

    # Running.

    def prepare(
        self,
        input: str | list[str] | Tensor,
        n_loops: int | None = None,
        *,
        initial_state: Tensor | None = None,
        seed: int | None = None,
        start_at_loop: int | None = None,
        stop_at_loop: int | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        prepend_bos: bool | None = None,
        padding_side: PaddingSide | None = None,
    ) -> Run:
        """Check the input of a run and make what the run needs; `forward` says what each is."""
        total, start, stop = resolve_loops(n_loops, start_at_loop, stop_at_loop, self.cfg)
        if start and initial_state is None:
            raise InputError(f"start_at_loop={start} needs initial_state: the state that a run stopped there returned.")
        if isinstance(input, Tensor):
            tokens = check_tokens(input, self.cfg).to(self.device)
            padding = padding_mask(tokens, self.tokenizer)
        else:
            tokens, padding = (
                one.to(self.device) for one in tokenize(self.tokenizer, input, prepend_bos, padding_side)
            )
            tokens = check_tokens(tokens, self.cfg)
        mask, visible, causal = visibility(tokens, attention_mask, padding)
        positions = resolve_positions(mask, position_ids)
        state, drawn = resolve_state(self.cfg, positions, initial_state, seed, self.dtype, self.training)
        given = initial_state is not None
        return Run(
            tokens, mask, visible, causal, positions, total, start, stop, stop_at_loop is None, state, drawn, given
        )

    def forward(
        self,
        input: str | list[str] | Tensor,
        n_loops: int | None = None,
        *,
        return_type: ReturnType = "logits",
        loss_per_token: bool = False,
        **options: Any,
    ) -> Any:
        """Run the model.

        Args:
            input: text, a list of texts, or token ids [batch, pos].
            n_loops: number of loops; None for the count it was trained with.
            return_type: "logits" [batch, pos, d_vocab]; "loss", the mean next-token cross entropy in nats over real
                tokens; "both" as a pair; None for nothing. A run that stops early returns the state instead.
            loss_per_token: the loss at each position, [batch, pos - 1], instead of its mean.
            initial_state: the state that enters the first loop to run, [batch, pos, d_model], in the model's dtype.
            seed: seed of the drawn initial state, where the model draws one. Every position has its own draw, the same
                in all rows of a batch, so a prompt's result does not depend on its batch.
            start_at_loop: first loop to run; needs `initial_state`.
            stop_at_loop: return the state that would enter this loop, before injection, [batch, pos, d_model].
            attention_mask: which tokens are real, [batch, pos]; None: all but the padding at either end. Or
                [batch, query, key], who may attend to whom in full.
            position_ids: positions for rotary, [batch, pos]; None: counted over real tokens.
            prepend_bos, padding_side: see `to_tokens`.

        Raises:
            InputError: the input is wrong; nothing was run.
            HookNameError: a registered hook is at a site or loop that this run does not reach; nothing was run.
        """
        return self.execute(self.prepare(input, n_loops, **options), return_type, loss_per_token)

    def execute(self, run: Run, return_type: ReturnType = "logits", loss_per_token: bool = False) -> Any:
        """Run what `prepare` made; returns as `forward` does."""
        if return_type not in ("logits", "loss", "both", None):
            raise InputError(f"return_type must be 'logits', 'loss', 'both' or None, got {return_type!r}.")
        if return_type in ("loss", "both"):
            if not run.reads_out:
                raise InputError(
                    f"a run with stop_at_loop returns a state, so it has no loss: leave out stop_at_loop, or "
                    f"return_type={return_type!r}."
                )
            if not bool((run.attention_mask[:, :-1] & run.attention_mask[:, 1:]).any()):
                raise InputError("the loss needs at least two tokens: one to read and one to predict.")
        elif loss_per_token:
            raise InputError(f"loss_per_token needs return_type 'loss' or 'both', got {return_type!r}.")
        self.reach(run).check_hooks()
        frame = self.frame(run)
        state = self.transformer(run.tokens, frame, run.state, run.start, run.stop)
        if not run.reads_out:
            return state
        logits = self.transformer.readout(state, frame)
        if return_type == "logits" or return_type is None:
            return logits if return_type else None
        loss = lm_cross_entropy_loss(logits, run.tokens, run.attention_mask, loss_per_token)
        return loss if return_type == "loss" else (logits, loss)

    def frame(self, run: Run) -> Frame:
        """Rotary angles and visibility of a run, for the native model."""
        return self.transformer.frame(run.visible, run.position_ids, run.causal)

    def reach(self, run: Run) -> Reach:
        """The sites that a run calls."""
        return Reach(self.hook_dict, run, self.transformer.needs_input(run.state is not None))

    def readout(
        self, state: Tensor, input: str | list[str] | Tensor, **options: Any
    ) -> Float[Tensor, "batch pos d_vocab"]:
        """The exact logits of the model if it stopped with this state.

        That is what the family does after its last loop: the head (Ouro: the state is normed already); or the final
        norm and the head; or norm, coda, norm, head (Huginn). The coda attends over all positions of the state.

        Args:
            state: a state leaving a loop (`hook_state_post`, or what `stop_at_loop` returned), [batch, pos, d_model].
            input: the text or tokens of that run, for positions and padding.
            options: `attention_mask`, `position_ids`, `prepend_bos`, `padding_side` as in `forward`.
        """
        run = self.prepare(input, self.cfg.n_loops, initial_state=state, **options)
        return self.transformer.readout(state.to(self.device), self.frame(run))

    def unrolled(
        self, n_loops: int | None = None, *, initial_state: Tensor | None = None, seed: int | None = None
    ) -> UnrolledModel:
        """This model as one of realised depth p + k·T + c, for TransformerLens's own tools; the weights are shared.

        Args:
            n_loops: loops to unroll; None for the count it was trained with.
            initial_state, seed: what every run of the view starts from, as in `forward`.
        """
        total, _, _ = resolve_loops(n_loops, None, None, self.cfg)
        return UnrolledModel(self, total, initial_state, seed)

    def generate(
        self, input: str | list[str] | Tensor, max_new_tokens: int = 10, n_loops: int | None = None, **options: Any
    ) -> str | list[str] | Tensor | Generated:
        """Generate text with the loops, initial states and hooks asked for. The same seed gives the same text.

        Args:
            input: text, a list of texts, or token ids [batch, pos].
            max_new_tokens: the most tokens to add.
            n_loops: loops of every token; None for the count the model was trained with.
            options: `do_sample`, `temperature`, `top_k`, `top_p`, `stop_at_eos`, `eos_token_id`, `stop_strings`,
                `seed`, `initial_state`, `exit_rule`, `watch`, `use_past_kv_cache`, `prepend_bos`, `padding_side`,
                `attention_mask`: see `tl_looped.generation.generate_stream`. `return_type`, `verbose`: see
                `tl_looped.generation.generate`.
        """
        return generate(self, input, max_new_tokens, n_loops, **options)

    def generate_stream(
        self, input: str | list[str] | Tensor, max_new_tokens: int = 10, n_loops: int | None = None, **options: Any
    ) -> TokenStream:
        """Generate text token by token: an iterator of steps, each with the new tokens and what they add to the text.

        Args:
            input, max_new_tokens, n_loops, options: see `tl_looped.generation.generate_stream`.
        """
        return generate_stream(self, input, max_new_tokens, n_loops, **options)

    # Hooks.

    def add_hook(
        self,
        name: HookName,
        hook: HookFn,
        dir: Direction = "fwd",
        is_permanent: bool = False,
        level: int | None = None,
        prepend: bool = False,
    ) -> None:
        """Register a hook until `reset_hooks`.

        Args:
            name: with a loop in it ("blocks.2.loop.3.hook_resid_post"), for that loop; without
                ("blocks.2.hook_resid_post"), for every loop, in order; or a function on names with their loop.
            hook: `fn(tensor, hook)`, which may return a tensor to put in its place. `hook.name`, `hook.loop`,
                `hook.layer()` say where it is. See `SharedHookPoint` for backward hooks.
            dir: "fwd" for activations, "bwd" for their gradients.
            is_permanent, level, prepend: as in TransformerLens.

        Raises:
            HookNameError: no such name; the message has the nearest ones.
        """
        if isinstance(name, str):
            point = self.hook_dict.shared(name)
            point.add_hook(hook, dir, is_permanent, level, prepend, where=HookSite.parse(name).loop)
        elif callable(name):
            for point in self.hook_dict.points():
                point.add_hook(hook, dir, is_permanent, level, prepend, where=name)
        else:
            raise InputError(f"a hook's name must be a string or a function on names, got {name!r}.")

    @contextmanager
    def hooks(  # pyright: ignore[reportIncompatibleMethodOverride] - immutable defaults
        self,
        fwd_hooks: Iterable[tuple[HookName, HookFn]] = (),
        bwd_hooks: Iterable[tuple[HookName, HookFn]] = (),
        reset_hooks_end: bool = True,
        clear_contexts: bool = False,
    ) -> Iterator[Any]:
        """Hooks for the length of a `with` block, as in TransformerLens; names as in `add_hook`."""
        self.context_level += 1
        try:
            for name, hook in fwd_hooks:
                self.add_hook(name, hook, level=self.context_level)
            for name, hook in bwd_hooks:
                self.add_hook(name, hook, "bwd", level=self.context_level)
            yield self
        finally:
            if reset_hooks_end:
                self.reset_hooks(clear_contexts, including_permanent=False, level=self.context_level)
            self.context_level -= 1

    def run_with_hooks(  # pyright: ignore[reportIncompatibleMethodOverride] - immutable defaults
        self,
        *model_args: Any,
        fwd_hooks: Iterable[tuple[HookName, HookFn]] = (),
        bwd_hooks: Iterable[tuple[HookName, HookFn]] = (),
        reset_hooks_end: bool = True,
        clear_contexts: bool = False,
        **model_kwargs: Any,
    ) -> Any:
        """Run once with hooks, as in TransformerLens; names as in `add_hook`.

        Backward hooks belong to this run's graph: they act when its output is run backward, after this call has
        returned.
        """
        with self.hooks(fwd_hooks, bwd_hooks, reset_hooks_end, clear_contexts):
            return self(*model_args, **model_kwargs)

    # Caching.

    def run_with_cache(  # pyright: ignore[reportIncompatibleMethodOverride] - a cache with a loop axis
        self,
        input: str | list[str] | Tensor,
        n_loops: int | None = None,
        *,
        names_filter: NamesFilter = None,
        loops: Iterable[int] | None = None,
        pos_slice: Any = None,
        device: torch.device | str | None = None,
        incl_bwd: bool = False,
        remove_batch_dim: bool = False,
        return_type: ReturnType = "logits",
        loss_per_token: bool = False,
        **options: Any,
    ) -> tuple[Any, LoopedCache]:
        """Run, and keep activations of the loops asked for.

        Args:
            input, n_loops, return_type, loss_per_token, options: as in `forward`.
            names_filter: a name, with a loop or (for all of them) without; several names; a function on names with
                their loop; None for every site but each head's result.
            loops: the loops to keep of the sites that loop; None for all. Negative numbers count from the end.
            pos_slice: positions to keep, as TransformerLens's Slice; of queries, for patterns and scores.
            device: where to keep the activations; None for where they are.
            incl_bwd: run backward from the output too (it must be the mean loss) and keep each gradient under its
                own loop's name and "_grad".
            remove_batch_dim: drop the batch axis, for a batch of one.

        Returns:
            What `forward` returns, and the cache.

        Raises:
            HookNameError: a name that the model does not have or this run does not reach; nothing was run.
        """
        run = self.prepare(input, n_loops, **options)
        if incl_bwd and (return_type != "loss" or loss_per_token or not run.reads_out):
            raise InputError("incl_bwd runs backward from the mean loss: pass return_type='loss' and no stop_at_loop.")
        if remove_batch_dim and run.tokens.shape[0] != 1:
            raise InputError(f"remove_batch_dim needs a batch of one, got {run.tokens.shape[0]} prompts.")
        chosen = self.reach(run).select(names_filter, loops)
        store: dict[str, Tensor] = {}
        writer = CacheWriter(store, device, Slice.unwrap(pos_slice), remove_batch_dim)
        with self.hooks():
            for point, where in chosen:
                point.add_hook(writer.save, level=self.context_level, where=where, reads_only=True)
                if incl_bwd:
                    point.add_hook(writer.save_grad, "bwd", level=self.context_level, where=where)
            output = self.execute(run, return_type, loss_per_token)
            if incl_bwd:
                output.backward()
        return output, LoopedCache(store, self, run, has_batch_dim=not remove_batch_dim)


def check_looped(model: object) -> LoopedModel:
    """The model, where it is a LoopedModel.

    Raises:
        InputError: it is another kind of model, as of TransformerLens, or the unrolled view.
    """
    if not isinstance(model, LoopedModel):
        raise InputError(
            f"this looks into loops, so it needs a LoopedModel, got {type(model).__name__}: for a feedforward model "
            "take tl_looped.observe, or the tensor functions on its cache."
        )
    return model


def token_texts(model: LoopedModel, ids: Int[Tensor, " token"]) -> tuple[str, ...]:
    """The text of each token; for a model without tokenizer, its id."""
    return tuple(map(str, ids.tolist()) if model.tokenizer is None else model.to_str_tokens(ids))
