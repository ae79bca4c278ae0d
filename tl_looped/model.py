"""LoopedModel: what a user holds."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformer_lens.utilities.lm_utils import lm_cross_entropy_loss
from transformers import PreTrainedTokenizerBase
from typing_extensions import Unpack

from tl_looped.adapters import Looping
from tl_looped.adapters.hub import find
from tl_looped.adapters.loading import Changes, load
from tl_looped.adapters.saving import save
from tl_looped.adapters.tokenizer import load_tokenizer
from tl_looped.engine.cache import CachingHooks, Keep, LoopedCache, run_with_cache
from tl_looped.engine.config import LoopedConfig
from tl_looped.engine.ends import PartOptions, ReturnType, with_part_options
from tl_looped.engine.errors import InputError
from tl_looped.engine.habits import ATTRIBUTES, no_attribute
from tl_looped.engine.numbers import check_device, check_dtype
from tl_looped.engine.parts import LoopUpdate
from tl_looped.engine.reach import NamesFilter
from tl_looped.engine.runs import Prompts, RunOptions, with_named_arguments, with_run_options
from tl_looped.engine.schedule import LoopCount
from tl_looped.generation import GeneratesText
from tl_looped.nn import LoopedTransformer, NativeNetwork, build
from tl_looped.nn.weights import HasWeights

if TYPE_CHECKING:  # TransformerBridge takes two seconds to import: what needs it does so when it is called
    from transformer_lens.model_bridge import TransformerBridge

    from tl_looped.unrolled import UnrolledModel

Self = TypeVar("Self", bound="LoopedModel")


class _TellsTheMend(type):
    """A class whose missing attributes are told with the call that does it here."""

    def __getattr__(cls, name: str) -> Any:
        known = [] if name.startswith("_") else dir(cls)
        raise AttributeError(no_attribute(cls.__name__, ATTRIBUTES, name, known))


class LoopedModel(CachingHooks, GeneratesText, HasWeights, metaclass=_TellsTheMend):
    """A looped language model with a hook point at every activation of every loop.

    Make one with `from_pretrained`, `from_model`, `from_bridge` or `from_config`. It is TransformerLens's
    HookedRootModule with names that have the loop in them (`engine.schedule`), and every run takes:

    - `n_loops`: how many loops; by default as many as the model was trained with. With two stacks that loop, a count
      or a pair: see `prepare`.
    - `initial_state`, `seed`: the state that enters the first loop, or the seed that draws it. A model that draws
      its state (Huginn) uses seed 0 unless told otherwise, so runs repeat; in `train()` mode it draws afresh.
    - `start_at_loop`, `stop_at_loop`, or at a layer `start_at`, `stop_at`: run a part; see `PartOptions`. Negative
      numbers count from the end.

    Args:
        transformer: the native model.
        tokenizer: a tokenizer of transformers, or None for token ids only.
    """

    transformer: NativeNetwork  # pyright: ignore[reportIncompatibleVariableOverride] - never set to another kind

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            known = [] if name.startswith("_") else dir(self)
            raise AttributeError(no_attribute(type(self).__name__, ATTRIBUTES, name, known)) from None

    # Making and keeping models.

    @classmethod
    @with_named_arguments
    def from_config(
        cls: type[Self],
        cfg: LoopedConfig,
        seed: int = 0,
        tokenizer: PreTrainedTokenizerBase | None = None,
        device: torch.device | str = "cpu",
        dtype: torch.dtype | str = torch.float32,
    ) -> Self:
        """A model with random weights from a seed; see `nn.ends.random_weights`."""
        place, kind = check_device(device), check_dtype(dtype)
        transformer = build(cfg)
        transformer.reset_parameters(seed)
        return cls(transformer.to(device=place, dtype=kind), tokenizer).eval()

    @classmethod
    @with_named_arguments
    def from_pretrained(
        cls: type[Self],
        name: str | Path,
        device: torch.device | str | None = None,
        dtype: torch.dtype | str | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        revision: str | None = None,
        subfolder: str | None = None,
        ignore_config_keys: Iterable[str] = (),
        loop_layers: tuple[int, int] | None = None,
        n_loops: int | None = None,
        update: LoopUpdate | None = None,
        n_ctx: int | None = None,
        adapter: str | Path | None = None,
    ) -> Self:
        """Load a checkpoint whole and exactly, without running code from it.

        Args:
            name: a hub id ("ByteDance/Ouro-1.4B"), a folder, or an embedded model ("looped-hops",
                "looped-hops-settling").
            device: where to put it; None: a GPU where there is one.
            dtype: of the weights, as torch.bfloat16 or "bfloat16"; None or "auto": as stored. A forward pass needs
                one format, so a checkpoint of mixed formats is refused unless this says which.
            tokenizer: instead of the checkpoint's own.
            revision: branch, tag or commit on the hub.
            subfolder: the folder in it that holds the model.
            ignore_config_keys: keys of config.json that you know to change nothing, to be read as if they were not
                there; a dot leads to a key in an object.
            loop_layers: (a, b) of a feedforward model: its layers a to b - 1 become the core, those before the prelude,
                those after the coda; None for all layers.
            n_loops: how often they run, in runs that do not say; None for once: the feedforward model itself.
            update: what a loop makes of the state x, with F(x) what comes out of the core: "replace": F(x), the
                default. "damped": x + (F(x) - x) / n_loops.
            n_ctx: the longest prompt, instead of the checkpoint's: positions beyond it turn by the same frequencies, or
                as dynamic scaling has it. To scale them in another way, change rope_scaling in config.json.
            adapter: a LoRA adapter of PEFT that was trained on this model, as a folder or a hub id: merged into the
                weights in float32, which are then cast. Keys of its adapter_config.json are ignored as "adapter.KEY".

        Raises:
            InputError: a dtype, device, revision or subfolder that can't be; layers that the model does not have, or
                looping asked of a model that is looped already.
            LoadError: an unknown family, a config key or value that is not implemented, a missing, extra or misshapen
                weight, one with NaN or infinite values or of integers, weights of mixed formats, a pickled checkpoint,
                a tokenizer that can't be read, an adapter of another kind or for another model, or a name that is none.
        """
        place, kind = check_device(device), None if dtype is None or dtype == "auto" else check_dtype(dtype)
        folder = find(name, revision, subfolder)
        looping = Looping(loop_layers, n_loops, update)
        changes = Changes(ignore_config_keys, looping, n_ctx)
        if adapter is not None:
            changes = replace(changes, adapter=find(adapter), adapter_name=str(adapter))
        full_name = f"{name}/{subfolder}" if subfolder else str(name)
        tokenizer = load_tokenizer(folder) if tokenizer is None else tokenizer
        return cls(load(folder, full_name, place, kind, changes), tokenizer).eval()

    @classmethod
    @with_named_arguments
    def from_model(
        cls: type[Self],
        hf_model: nn.Module,
        tokenizer: PreTrainedTokenizerBase | None = None,
        *,
        loop_layers: tuple[int, int] | None = None,
        n_loops: int | None = None,
        update: LoopUpdate | None = None,
        n_ctx: int | None = None,
        ignore_config_keys: Iterable[str] = (),
    ) -> Self:
        """A model of transformers that is in memory, looked into loop by loop: its weights are shared, not copied.

        A weight that both store alike is one `nn.Parameter` of both models, with one gradient. One that they store in
        another way (GPT-2's matrices are turned, queries, keys and values are one tensor in GPT-2 and Huginn) is a
        Parameter of its own on the same memory: an edit or an optimizer's step of one model is seen by the other, a
        gradient is not. `to` and `half` on one of the models change or part them, so move and cast before.

        Args:
            hf_model: with its head, as AutoModelForCausalLM.from_pretrained(...); of remote code too, where the family
                is one that loads. Compiled or in DataParallel, it is the model inside.
            tokenizer: its tokenizer; None for token ids only.
            loop_layers, n_loops, update, n_ctx, ignore_config_keys: as in `from_pretrained`.

        Raises:
            InputError: weights that are not plain (quantised, with adapters, not loaded), on several devices, or in a
                bridge; or what is no model of transformers.
            LoadError: an unknown family, and what `from_pretrained` refuses in a config or weights.

        Example:
            hf_model = AutoModelForCausalLM.from_pretrained("Qwen/Qwen3-0.6B")
            model = LoopedModel.from_model(hf_model, AutoTokenizer.from_pretrained("Qwen/Qwen3-0.6B"))
        """
        changes = Changes(ignore_config_keys, Looping(loop_layers, n_loops, update), n_ctx)
        from tl_looped.adapters.memory import share

        return cls(share(hf_model, changes), tokenizer).eval()

    @classmethod
    @with_named_arguments
    def from_bridge(
        cls: type[Self],
        bridge: TransformerBridge,
        *,
        loop_layers: tuple[int, int] | None = None,
        n_loops: int | None = None,
        update: LoopUpdate | None = None,
        n_ctx: int | None = None,
        ignore_config_keys: Iterable[str] = (),
    ) -> Self:
        """The model in a TransformerBridge, with its tokenizer: the weights are shared as in `from_model`.

        Args:
            bridge: of TransformerLens, its weights not processed.
            loop_layers, n_loops, update, n_ctx, ignore_config_keys: as in `from_pretrained`.

        Raises:
            InputError: weights that are processed (folded norms, centred weights) or not plain; or no bridge.
            LoadError: an architecture that has no native form here, and what `from_pretrained` refuses.

        Example:
            bridge = TransformerBridge.boot_transformers("gpt2")
            model = LoopedModel.from_bridge(bridge, loop_layers=(4, 8), n_loops=2)
        """
        changes = Changes(ignore_config_keys, Looping(loop_layers, n_loops, update), n_ctx)
        from tl_looped.adapters.memory import share_bridge

        return cls(share_bridge(bridge, changes), bridge.tokenizer).eval()

    def save_pretrained(self, folder: str | Path) -> None:
        """Write config, weights and tokenizer in tl_looped's own format; `from_pretrained(folder)` reads it back."""
        save(self.transformer, self.tokenizer, Path(folder))

    # As in TransformerLens.

    def to_single_str_token(self, int_token: int) -> str:
        """The text of one token id."""
        return str(self.to_str_tokens([int_token])[0])

    def get_token_position(
        self,
        single_token: str | int,
        input: str | Tensor,
        mode: Literal["first", "last"] = "first",
        prepend_bos: bool | None = None,
    ) -> int:
        """Where a token stands in a prompt.

        Args:
            single_token: as text or id.
            input: text, or token ids of one prompt.
            mode: the first of several, or the last.
            prepend_bos: as in `to_tokens`.

        Raises:
            InputError: it does not occur, or there are several prompts.
        """
        wanted = self.to_single_token(single_token) if isinstance(single_token, str) else int(single_token)
        tokens = self.to_tokens(input, prepend_bos)
        if len(tokens) != 1 or mode not in ("first", "last"):
            raise InputError(f"needs one prompt and mode 'first' or 'last', got {len(tokens)} prompts and {mode!r}.")
        places = (tokens[0] == wanted).nonzero().flatten().tolist()
        if not places:
            raise InputError(
                f"the token {single_token!r} does not occur in this prompt: {self.token_texts(tokens[0])}."
            )
        return places[0 if mode == "first" else -1]

    def loss_fn(
        self,
        logits: Float[Tensor, "batch pos d_vocab"],
        tokens: Int[Tensor, "batch pos"],
        attention_mask: Tensor | None = None,
        per_token: bool = False,
    ) -> Float[Tensor, "..."]:
        """Cross-entropy of the next tokens, in nats: the mean, or [batch, pos - 1]; see return_type="loss" too."""
        self.cfg.check_causal("a loss of next tokens")
        return lm_cross_entropy_loss(logits, tokens.to(logits.device), attention_mask, per_token)

    # Running.

    @with_run_options
    def last_logits(
        self, prompts: Prompts, n_loops: LoopCount | None = None, **options: Unpack[RunOptions]
    ) -> Float[Tensor, "batch d_vocab"]:
        """What the model says after each prompt: the logits at every row's last real token, wherever it stands.

        Args:
            prompts, n_loops, options: as in `forward`.
        """
        run = self.batch(prompts, n_loops, **options)
        if run.span(self.cfg).within:
            raise InputError(
                "last logits are those of a run from a loop's beginning on: leave out start_at and stop_at."
            )
        self.reach(run).check_hooks()
        frame = self.frame(run)
        out = self.transformer.finish(self.transformer(run.tokens, frame, run.state, run.start, run.stop), frame)
        return self.transformer.unembed(out[torch.arange(len(out)), run.last_positions])

    def unrolled(
        self, n_loops: LoopCount | None = None, *, initial_state: Tensor | None = None, seed: int | None = None
    ) -> UnrolledModel:
        """This model as one of realised depth p + k·T + c, for TransformerLens's own tools; the weights are shared.

        Args:
            n_loops: loops to unroll; None for the count it was trained with.
            initial_state, seed: what every run of the view starts from, as in `forward`.
        """
        from tl_looped.unrolled import UnrolledModel

        total, l_cycles = self.cfg.counts(n_loops)
        return UnrolledModel(self, total if l_cycles is None else (total, l_cycles), initial_state, seed)

    # Caching.

    @with_part_options
    def run_with_cache(  # pyright: ignore[reportIncompatibleMethodOverride] - a cache with a loop axis
        self,
        input: Prompts,
        n_loops: LoopCount | None = None,
        *,
        names_filter: NamesFilter = None,
        loops: Iterable[int] | None = None,
        pos_slice: Any = None,
        device: torch.device | str | None = None,
        incl_bwd: bool = False,
        remove_batch_dim: bool = False,
        return_type: ReturnType = "logits",
        loss_per_token: bool = False,
        **options: Unpack[PartOptions],
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
                own loop's name and "_grad": that of the first state too, given or drawn, and with frozen weights; none
                of the exit gate, which the output does not read.
            remove_batch_dim: drop the batch axis, for a batch of one.

        Returns:
            What `forward` returns, and the cache.

        Raises:
            HookNameError: a name that the model does not have or this run does not reach; nothing was run.
        """
        run = self.batch(input, n_loops, **options)
        keep = Keep(names_filter, loops, pos_slice, device, incl_bwd, remove_batch_dim)
        return run_with_cache(self, run, keep, return_type, loss_per_token)


def check_looped(model: object, *, several_stacks: bool = False) -> LoopedModel:
    """The model, where it is a LoopedModel, and one core loops in it.

    Args:
        model: what was given.
        several_stacks: whether the call knows of models in which two stacks loop.

    Raises:
        InputError: it is another kind of model, as of TransformerLens, or the unrolled view; or one with two stacks.
    """
    if not isinstance(model, LoopedModel):
        raise InputError(
            f"this looks into loops, so it needs a LoopedModel, got {type(model).__name__}: for a feedforward model "
            "take tl_looped.observe, or the tensor functions on its cache."
        )
    if not several_stacks:
        one_core(model)
    return model


def one_core(model: LoopedModel) -> LoopedTransformer:
    """The network of a model in which one core loops.

    Raises:
        InputError: two stacks loop in it.
    """
    model.cfg.check_one_core()
    return cast(LoopedTransformer, model.transformer)
