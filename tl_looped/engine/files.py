"""A file that is written whole or not at all, and one that is read as what it says it is."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from tl_looped.engine.errors import InputError


def check_output(path: str | Path) -> Path:
    """The path of a file that can be written, or an error; leaves nothing behind.

    Raises:
        InputError: the folder is missing or can't be written to; or the path is a folder, a device or a read-only file.
    """
    try:
        target = Path(path).resolve()  # through a link, so that the link stays
        if target.is_dir():
            raise InputError(f"{str(path)!r} is a folder: give the name of the file to write.")
        if not target.parent.is_dir():
            raise InputError(f"{str(path)!r} can't be written: there is no folder {str(target.parent)!r}.")
        if target.exists() and not target.is_file():
            raise InputError(f"{str(path)!r} is not a regular file: give the name of the file to write.")
        if target.exists() and not os.access(target, os.W_OK):
            raise InputError(f"{str(path)!r} is a read-only file: choose another name.")
        with tempfile.NamedTemporaryFile(dir=target.parent, prefix=f".{target.name}-"):
            pass  # the surest way to know whether a file can be made there
    except (OSError, ValueError) as error:  # InputError is a ValueError, and goes on as it is
        if isinstance(error, InputError):
            raise
        raise InputError(f"{str(path)!r} can't be written: {error}.") from error
    return target


def write_whole(path: str | Path, content: str | bytes | Callable[[str], object]) -> Path:
    """Write a file under another name and move it into place when it is complete; text as UTF-8.

    Args:
        path: the file.
        content: of the file, or what writes it, given the name to write to.
    """
    target = check_output(path)
    umask = os.umask(0)
    os.umask(umask)
    handle, partial = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}-")
    try:
        with os.fdopen(handle, "wb") as file:
            if not callable(content):
                file.write(content.encode() if isinstance(content, str) else content)
        if callable(content):
            content(partial)
        os.chmod(partial, 0o666 & ~umask)  # as any new file; a temporary one is private
        os.replace(partial, target)
    except (OSError, SafetensorError) as error:
        raise InputError(f"{str(path)!r} can't be written: {error}.") from error
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(partial)
    return target


def read_safetensors(
    path: str | Path, file_format: str, what: str, device: torch.device | str = "cpu"
) -> tuple[dict[str, str], dict[str, Tensor]]:
    """(header, tensors by name) of a safetensors file whose header names this format.

    Raises:
        InputError: no such file, or another kind of file; the message says that it is not `what`.
    """
    try:
        with safe_open(Path(path), framework="pt", device=str(device)) as file:
            header = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - safe_open is no dict
    except (OSError, SafetensorError) as error:
        raise InputError(f"{str(path)!r} can't be read as {what}: {error}") from error
    if header.get("format") != file_format:
        raise InputError(f"{str(path)!r} is a safetensors file, but not {what} of tl_looped.")
    return header, tensors
