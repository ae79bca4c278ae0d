"""Checkpoints, whole and exactly: config.json and safetensors in, no code run, nothing unpickled."""

from __future__ import annotations

import glob
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import reduce
from pathlib import Path, PurePosixPath
from typing import Any, TypeGuard

import torch
import transformers
from huggingface_hub import snapshot_download
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from tl_looped.adapters import Adapter, Looping, Source, adapter_for
from tl_looped.adapters.base import ConfigKeys, Json, without
from tl_looped.adapters.native import to_json
from tl_looped.engine.config import LoopedConfig
from tl_looped.engine.errors import InputError, LoadError, nearest
from tl_looped.nn import NativeNetwork, build

EMBEDDED = Path(__file__).parents[1] / "training" / "checkpoints"
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_WANTED = ("*.json", "*.safetensors", "*.model", "*.txt", "*.jinja")
# A star of the hub matches a slash too. Optimizer states, and second copies of the weights in another layout.
_UNWANTED = ("*/*", "optimizer*", "scheduler*", "consolidated*")
_TOKENIZER = ("tokenizer*", "vocab.*", "merges.txt", "spiece.model", "*.bpe.model", "*.tiktoken")
_FORMATS = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64}
_WRAPPED = "_orig_mod."  # by torch.compile
_PREFIXES = ("module.", "model.", "transformer.", "gpt.")
_PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


def embedded_names() -> list[str]:
    """The models that come with the package."""
    return sorted(path.parent.name for path in EMBEDDED.glob("*/config.json"))


def find(name: str | Path, revision: str | None = None, subfolder: str | None = None) -> Path:
    """The folder of an embedded model, a local folder, or a hub id (downloaded, without code or pickles).

    Raises:
        InputError: a revision of what is not on the hub, or a subfolder that leads out of the folder.
        LoadError: there is no such folder.
    """
    if subfolder is not None and (not subfolder or {"..", "/"} & {*PurePosixPath(subfolder).parts}):
        raise InputError(f"subfolder must be the path of a folder below {str(name)!r}, got {subfolder!r}.")
    folder = _local(name)
    if folder is None:
        folder = _download(str(name), revision, subfolder)
    elif revision is not None:
        raise InputError(f"revision={revision!r}, but {str(name)!r} is no hub id: leave revision out.")
    if subfolder is None:
        return folder
    if not (folder / subfolder).is_dir():
        raise LoadError(f"{str(name)!r} has no folder {subfolder!r}.")
    return folder / subfolder


def _local(name: str | Path) -> Path | None:
    """The folder of an embedded model or a local one; None for a hub id."""
    text, path = str(name), Path(name)
    if text in embedded_names():
        return EMBEDDED / text
    if path.is_file():
        raise LoadError(f"{text!r} is a file: pass the folder that holds config.json and the .safetensors files.")
    if path.is_dir():
        return path
    if not _HUB_ID.fullmatch(text):
        raise LoadError(
            f"{text!r} is no folder, no hub id ('owner/name') and no embedded model "
            f"({', '.join(embedded_names())}).{nearest(text, embedded_names())}"
        )
    return None


def _download(name: str, revision: str | None, subfolder: str | None) -> Path:
    """A snapshot of a repository's top folder, or of one below it, without what lies deeper."""
    below = f"{glob.escape(subfolder.strip('/'))}/" if subfolder else ""
    wanted, unwanted = ([below + pattern for pattern in patterns] for patterns in (_WANTED, _UNWANTED))
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=wanted, ignore_patterns=unwanted))
    except Exception as error:  # the hub's errors have no common base
        raise LoadError(f"{name!r} is no local folder, and the hub gave: {type(error).__name__}: {error}") from error


@dataclass(frozen=True)
class Stored:
    """What the header of a safetensors file says of a tensor: `format` as "BF16" or "I8", `name` in the file."""

    shape: tuple[int, ...]
    format: str
    file: Path
    name: str


def load(
    folder: Path,
    name: str,
    device: torch.device,
    dtype: torch.dtype | None,
    ignore_config_keys: Iterable[str] = (),
    looping: Looping | None = None,
) -> NativeNetwork:
    """The model in a folder; nothing is loaded unless config, names, shapes and formats of all weights are right.

    Weights are read one tensor at a time, so peak memory is one copy of them and one tensor. All get one number format,
    as a forward pass needs one: weights stored in several are refused, not rounded or widened unasked.

    Args:
        folder: has config.json and the weights.
        name: what the model is called.
        device: where to put it.
        dtype: of the weights; None: as stored.
        ignore_config_keys: keys of config.json to read as if they were not there.
        looping: how to loop it, where it is a feedforward model; None for as it is.
    """
    values = without(_read_json(folder / "config.json"), ignore_config_keys)
    adapter, stored = adapter_for(values), _stored(folder)
    cfg = _config(adapter, values, folder, frozenset(stored), name)
    cfg = cfg if looping is None else looping.applied(cfg, adapter)
    with torch.device("meta"):
        model = build(cfg)
    sources, checks = adapter.sources(cfg), adapter.checked(cfg)
    stored = _as_the_family_names(stored, {source.name for source in sources.values()})
    head = sources.pop("unembed.weight", None) if cfg.tie_embeddings else None
    _check_stored(model, sources, stored, {*checks, *([head.name] if head else [])})
    targets: dict[str, list[str]] = {}
    for ours, source in sources.items():
        targets.setdefault(source.name, []).append(ours)
    kind = dtype or _one_dtype({theirs: stored[theirs].format for theirs in targets})
    with tqdm(total=len(stored), desc=f"Loading {cfg.model_name}", disable=len(stored) < 200) as bar:
        for file in sorted({one.file for one in stored.values()}):
            with safe_open(file, framework="pt") as tensors:
                for theirs in [name for name, one in stored.items() if one.file == file]:
                    tensor = tensors.get_tensor(stored[theirs].name)
                    if theirs in checks:
                        checks[theirs](tensor)
                    for ours in targets.get(theirs, ()):
                        _assign(model, ours, sources[ours], tensor, device, kind)
                    bar.update()
    if cfg.tie_embeddings:
        _tie(model, head, stored)
    return model


def _config(adapter: Adapter, values: Json, folder: Path, names: frozenset[str], model_name: str) -> LoopedConfig:
    """Our config, with the tokens that end a text; an error for any key of config.json that no one knows."""
    keys, generation = ConfigKeys(values), folder / "generation_config.json"
    ends = _read_json(generation).get("eos_token_id") if generation.exists() else None
    ends = keys.get("eos_token_id") if ends is None else ends
    try:
        cfg = adapter.config(keys, names, model_name)
        if ends is not None:
            cfg = replace(cfg, eos_token_ids=tuple(ends if isinstance(ends, list) else [ends]))
    except InputError as error:
        raise LoadError(f"config.json: {error}") from error
    keys.refuse_rest(cfg.family)
    return cfg


def _as_the_family_names(stored: dict[str, Stored], wanted: set[str]) -> dict[str, Stored]:
    """The tensors under the names that the family has, where all carry a prefix that it has not, or lack one.

    Training wrappers add one, and a model that was saved without its head lacks one, as GPT-2's on the hub.
    """
    found = {name.removeprefix(_WRAPPED): one for name, one in stored.items()}
    kinds = [stored, found]
    kinds += [{name.removeprefix(prefix): one for name, one in found.items()} for prefix in _PREFIXES]
    kinds += [{prefix + name: one for name, one in found.items()} for prefix in _PREFIXES]
    best = max(kinds, key=lambda names: len(wanted & set(names)))  # the first of those that are equally good
    return best if len(best) == len(stored) else stored


def _one_dtype(formats: dict[str, str]) -> torch.dtype:
    """The number format that all weights have."""
    found: dict[torch.dtype, list[str]] = {}
    for name, kind in formats.items():
        found.setdefault(_FORMATS[kind], []).append(name)
    if len(found) > 1:
        shown = ", ".join(f"{kind} ({_some(names, 2)})" for kind, names in found.items())
        widest = reduce(torch.promote_types, found)
        raise LoadError(
            f"the weights are stored in several number formats: {shown}. A model runs in one: pass dtype={widest}, "
            "which holds all of them exactly, or another."
        )
    return next(iter(found))


def _assign(
    model: nn.Module, name: str, source: Source, tensor: Tensor, device: torch.device, dtype: torch.dtype
) -> None:
    """Make a parameter of the rows of a stored tensor; all of its numbers must be finite."""
    owner, _, attribute = name.rpartition(".")
    module = model.get_submodule(owner)
    tensor = tensor.T if source.transposed else tensor
    rows = tensor.reshape(-1, *getattr(module, attribute).shape[1:])[source.start : source.stop]
    weight = rows.to(device=device, dtype=dtype, copy=True)
    if not bool(torch.stack(torch.aminmax(weight)).isfinite().all()):  # one quick pass, and NaN shows in both
        bad = int((~rows.isfinite()).sum())
        if bad:
            raise LoadError(f"{source.name!r} is stored with {bad} values that are NaN or infinite.")
        raise LoadError(
            f"{source.name!r} has values up to {float(rows.abs().max()):.3g}, too large for dtype={dtype}: pass "
            "dtype=torch.bfloat16 or torch.float32."
        )
    setattr(module, attribute, nn.Parameter(weight))


def _tie(model: NativeNetwork, head: Source | None, stored: dict[str, Stored]) -> None:
    """Make a tied head the embedding itself; a head stored beside it must be equal."""
    model.unembed.weight = model.embed.weight
    if head is not None and head.name in stored:
        with safe_open(stored[head.name].file, framework="pt") as tensors:
            beside = tensors.get_tensor(stored[head.name].name).to(model.embed.weight)
        if not torch.equal(beside, model.embed.weight):
            raise LoadError(f"the config ties the head to the embedding, but the stored {head.name!r} differs from it.")


def _check_stored(model: NativeNetwork, sources: dict[str, Source], stored: dict[str, Stored], extra: set[str]) -> None:
    """Raise unless the stored tensors are exactly those that make the model, and hold floating-point numbers."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    shapes = {ours: tuple(parameters[ours].shape)[:: -1 if one.transposed else 1] for ours, one in sources.items()}
    wanted = {source.name: source.shape or shapes[ours] for ours, source in sources.items()}
    known = sorted(set(stored) & set(wanted))
    problems = {
        "missing": sorted(set(wanted) - set(stored)),
        "not known to this family": sorted(set(stored) - set(wanted) - extra),
        "misshapen": [f"{n} is {stored[n].shape}, not {wanted[n]}" for n in known if stored[n].shape != wanted[n]],
        f"not in one of the formats {', '.join(_FORMATS)}, as quantised weights are": [
            f"{n} is {one.format}" for n, one in sorted(stored.items()) if one.format not in _FORMATS and n not in extra
        ],
    }
    if any(problems.values()):
        raise LoadError(
            f"the stored weights are not those of a {model.cfg.family} model of this config. "
            + ". ".join(f"{what}: {_some(names)}" for what, names in problems.items() if names)
        )


def _some(names: list[str], limit: int = 5) -> str:
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more


def _stored(folder: Path) -> dict[str, Stored]:
    """Every tensor in the folder's safetensors, from their headers alone."""
    files = _weight_files(folder)
    lost = [file.name for file in files if not file.exists()]
    if lost:
        raise LoadError(f"{folder} lacks the shards {_some(lost)} that its index names.")
    if not files:
        pickled = [path.name for path in folder.iterdir() if path.suffix in _PICKLED]
        if pickled:
            raise LoadError(
                f"{folder} has only pickled weights ({_some(sorted(pickled))}), which can run code when read: "
                "convert them to safetensors."
            )
        raise LoadError(f"{folder} has no .safetensors weights.")
    stored: dict[str, Stored] = {}
    for file in files:
        try:
            with safe_open(file, framework="pt") as tensors:
                for name in tensors.keys():  # noqa: SIM118 - safe_open is no dict
                    if name in stored:
                        raise LoadError(f"{name!r} is stored twice: in {stored[name].file.name} and in {file.name}.")
                    header = tensors.get_slice(name)
                    stored[name] = Stored(tuple(header.get_shape()), header.get_dtype(), file, name)
        except SafetensorError as error:
            raise LoadError(f"{file} is not a whole safetensors file: {error}") from error
    return stored


def _weight_files(folder: Path) -> list[Path]:
    """The files that an index names; or model.safetensors; or else every .safetensors file."""
    index, single = folder / "model.safetensors.index.json", folder / "model.safetensors"
    if index.exists():
        return sorted({folder / name for name in _read_json(index).get("weight_map", {}).values()})
    return [single] if single.exists() else sorted(folder.glob("*.safetensors"))


def _read_json(path: Path) -> dict[str, Any]:
    if not path.exists():
        raise LoadError(f"{path.parent} has no {path.name}.")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise LoadError(f"{path} is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise LoadError(f"{path} holds no JSON object.")
    return content


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase | None:
    """The tokenizer in a folder; None where no file belongs to one. Runs no code of the checkpoint.

    It is read from tokenizer.json; without that, by the class of transformers that tokenizer_config.json names, from
    the files of that class (vocab.json and merges.txt, a sentencepiece model, ...).

    Raises:
        LoadError: there are files of a tokenizer that can't be read.
    """
    files = sorted({path.name for pattern in _TOKENIZER for path in folder.glob(pattern)})
    if not files:
        return None
    mend = "Pass tokenizer=..., or take these files away to run on token ids alone."
    kind = PreTrainedTokenizerFast
    if "tokenizer.json" not in files:
        named = _read_json(folder / "tokenizer_config.json") if "tokenizer_config.json" in files else {}
        kind = getattr(transformers, str(named.get("tokenizer_class")), None)
        if not _reads_own_files(kind):
            raise LoadError(
                f"{folder} has {_some(files)} but no tokenizer.json, and says tokenizer_class="
                f"{named.get('tokenizer_class')!r}, which is no class of transformers that could read them. {mend}"
            )
        own = [file for file in kind.vocab_files_names.values() if file != "tokenizer.json"]
        if not any((folder / file).exists() for file in own):
            raise LoadError(f"{folder} has none of the files {own} of a {kind.__name__}, only {_some(files)}. {mend}")
    try:
        return kind.from_pretrained(str(folder), local_files_only=True)
    except Exception as error:  # tokenizers raises bare Exception
        raise LoadError(f"the tokenizer in {folder} ({_some(files)}) can't be read: {error}. {mend}") from error


def _reads_own_files(kind: object) -> TypeGuard[type[PreTrainedTokenizerBase]]:
    """Whether this is a tokenizer of one model, which knows how to split; the general classes need a tokenizer.json."""
    return (
        isinstance(kind, type)
        and issubclass(kind, PreTrainedTokenizerBase)
        and kind.__module__.startswith("transformers.models.")
    )


def save(model: NativeNetwork, tokenizer: PreTrainedTokenizerBase | None, folder: Path) -> None:
    """Write config, weights and tokenizer in our own format: all of it, or nothing.

    Raises:
        InputError: the model holds modules or weights that are not its own, as adapters; nothing was written.
        LoadError: the folder can't be written, or is not empty.
    """
    _check_own(model)
    with whole_folder(folder) as partial:
        (partial / "config.json").write_text(json.dumps(to_json(model.cfg), indent=1) + "\n", encoding="utf-8")
        weights = {name: weight.detach().cpu().contiguous() for name, weight in model.named_parameters()}
        save_file(weights, partial / "model.safetensors")
        if tokenizer is not None:
            tokenizer.save_pretrained(str(partial))


def _check_own(model: NativeNetwork) -> None:
    """Raise unless modules and weights are those that the config alone makes, so that they load again."""
    with torch.device("meta"):
        plain = build(model.cfg)
    kinds = {name: type(module) for name, module in plain.named_modules()}
    foreign = [f"{n or 'model'} ({type(m).__name__})" for n, m in model.named_modules() if kinds.get(n) is not type(m)]
    shapes = [{(n, tuple(w.shape)) for n, w in one.named_parameters()} for one in (model, plain)]
    foreign += sorted({f"{name} {shape}" for name, shape in shapes[0] ^ shapes[1]} if not foreign else ())
    if foreign:
        raise InputError(
            f"the model has parts that its config does not make, so a saved copy would not be the model: "
            f"{_some(foreign)}. Merge adapters into the weights first (PEFT: merge_and_unload()), or remove them."
        )


@contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """A new folder that appears under its name only when the block has ended well."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise LoadError(f"{folder} exists and is not an empty folder: choose another.")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}-"))
    except OSError as error:
        raise LoadError(f"{folder} can't be written: {error}") from error
    try:
        yield partial
        partial.chmod(0o755)
        os.replace(partial, folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
