"""Where a checkpoint is: among the embedded ones, in a folder, or on the hub."""

from __future__ import annotations

import glob
import re
from pathlib import Path, PurePosixPath

from huggingface_hub import snapshot_download
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

from tl_looped.engine.errors import InputError, LoadError, nearest

EMBEDDED = Path(__file__).parents[1] / "training" / "checkpoints"
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_WANTED = ("*.json", "*.safetensors", "*.model", "*.txt", "*.jinja")
# A star of the hub matches a slash too. Optimizer states, and second copies of the weights in another layout.
_UNWANTED = ("*/*", "optimizer*", "scheduler*", "consolidated*")


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
        mend = ""
        if isinstance(error, GatedRepoError):  # which is a RepositoryNotFoundError too
            mend = (
                f" The repository is gated: ask for access at https://huggingface.co/{name}, then run `hf auth login` "
                "or set HF_TOKEN."
            )
        elif isinstance(error, RepositoryNotFoundError):
            mend = " Where the repository is private, run `hf auth login` or set HF_TOKEN."
        raise LoadError(
            f"{name!r} is no local folder, and the hub gave: {type(error).__name__}: {error}{mend}"
        ) from error
