"""Pickled checkpoints, as training runs write them, into folders that load: `tl-looped convert`."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml

from tl_looped.adapters.loading import Changes, Plan
from tl_looped.adapters.saving import whole_folder
from tl_looped.adapters.weights import PICKLED, FolderWeights, read_json, read_object, some
from tl_looped.engine.errors import LoadError

_STEP = re.compile(r"(?:model_|step_)(\d+)")  # nanochat's model_000650.pt, and HRM's step_1234
_NOT_WEIGHTS = re.compile(r"optim|scheduler|rng|training_args|scaler")
_BESIDE = ("generation_config.json", "tokenizer*", "special_tokens_map.json", "vocab.*", "merges.txt", "*.jinja")


def convert(source: str | Path, out: str | Path, config: str | Path | None = None) -> Path:
    """Turn a pickled checkpoint into a folder of safetensors and config.json that `from_pretrained` loads.

    The file is read with torch's weights-only reading, in a process of its own. Names and config stay in the family's
    released form; config, names and shapes are checked against the family before the folder appears.

    Args:
        source: the file (.pt, .pth, .bin, .ckpt, or HRM's without an ending), or a folder with one of them, or with
            several shards that its index names.
        out: the folder to make.
        config: the model's config as JSON or YAML; None for what lies beside the file: config.json, nanochat's
            meta_*.json of the same step, HRM's all_config.yaml with dataset.json.

    Returns:
        The folder.

    Raises:
        LoadError: no such file, or several; a file that holds anything but tensors and plain values; no config, or one
            that does not make these weights; a folder that is not empty. Nothing is written then.

    Example:
        convert("base_checkpoints/d4/model_000650.pt", "nanochat-d4")
        model = LoopedModel.from_pretrained("nanochat-d4")
    """
    files = _files(Path(source))
    folder = files[0].parent
    values = _config_of(Path(config)) if config is not None else _config_beside(files[0])
    with whole_folder(Path(out)) as partial:
        for i, file in enumerate(files):
            name = "model.safetensors" if len(files) == 1 else f"model-{i + 1:05}-of-{len(files):05}.safetensors"
            _unpickle(file, partial / name)
        (partial / "config.json").write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")
        for pattern in _BESIDE:
            for path in folder.glob(pattern):
                if path.is_file() and path.suffix not in PICKLED:
                    shutil.copy(path, partial / path.name)
        Plan.of(values, None, FolderWeights(partial), Path(out).name, Changes())
    return Path(out)


def _files(source: Path) -> list[Path]:
    """The pickled files that hold the weights."""
    if source.is_file():
        return [source]
    if not source.is_dir():
        raise LoadError(f"{str(source)!r} is no file and no folder: give a pickled checkpoint, or the folder it is in.")
    for index in sorted(source.glob("*.bin.index.json")):
        files = [source / name for name in sorted(set(read_json(index).get("weight_map", {}).values()))]
        lost = [file.name for file in files if not file.is_file()]
        if lost or not files:
            raise LoadError(f"{source} lacks the shards {some(lost)} that {index.name} names.")
        return files
    found = [path for path in sorted(source.iterdir()) if path.suffix in PICKLED or _STEP.fullmatch(path.name)]
    found = [path for path in found if not _NOT_WEIGHTS.search(path.name)]
    if len(found) == 1:
        return found
    if not found:
        raise LoadError(f"{str(source)!r} has no pickled checkpoint ({', '.join(PICKLED)}): give the file.")
    raise LoadError(
        f"{str(source)!r} has several checkpoints, {some([path.name for path in found])}: give one of them."
    )


def _config_beside(file: Path) -> dict[str, Any]:
    """The config that lies beside a checkpoint."""
    folder, step = file.parent, _STEP.match(file.name)
    meta = folder / f"meta_{step.group(1)}.json" if step else None
    if meta is not None and meta.is_file():
        return _config_of(meta)
    if (folder / "config.json").is_file():
        return _config_of(folder / "config.json")
    whole, data = folder / "all_config.yaml", folder / "dataset.json"
    if whole.is_file() and data.is_file():
        return {**_config_of(whole), "dataset": read_json(data)}
    if whole.is_file():
        raise LoadError(
            f"{folder} has all_config.yaml, but no dataset.json: copy that of the training data (data/.../train) "
            "beside it, as it says how many puzzles and tokens there are."
        )
    raise LoadError(
        f"{folder} has no config.json{f', no {meta.name}' if meta else ''} and no all_config.yaml: pass the model's "
        "config, --config FILE (convert(..., config=...))."
    )


def _config_of(path: Path) -> dict[str, Any]:
    if path.suffix not in (".yaml", ".yml"):
        return read_json(path)
    return read_object(path, yaml.safe_load, yaml.YAMLError, "plain YAML")


def _unpickle(file: Path, target: Path) -> None:
    command = [sys.executable, "-m", "tl_looped.adapters.unpickle", str(file.resolve()), str(target.resolve())]
    # In a folder of ours: `-m` looks for modules where it runs, and beside a checkpoint there may be any.
    done = subprocess.run(command, capture_output=True, text=True, cwd=target.parent)
    try:
        said = json.loads(done.stdout.splitlines()[-1])
    except (IndexError, ValueError):
        last = done.stderr.strip().splitlines()[-1:] or [f"the process ended with {done.returncode}"]
        raise LoadError(f"{str(file)!r} could not be converted: {last[0]}") from None
    if "refused" in said:
        raise LoadError(f"{str(file)!r} is not converted: {said['refused']}")
