"""A process of its own that reads one pickled checkpoint and writes its tensors: `python -m` this, see `convert`.

torch's weights-only reading makes tensors and plain containers, and refuses any other class or function by name. What
it reads it reads here, where nothing else is.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

_PLACES = ("model", "state_dict", "model_state_dict", "module", "weights")


class _Refused(Exception):
    """Why a file is not converted."""


def _read(path: Path) -> Any:
    try:
        try:
            return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError:  # a file of before torch 1.6, which can't be mapped
            return torch.load(path, map_location="cpu", weights_only=True)
    except UnpicklingError as error:
        lines = [line.strip() for line in str(error).splitlines() if "GLOBAL" in line or "nsupported" in line]
        raise _Refused(
            "reading it would run code or make objects that are no tensors: "
            f"{lines[0] if lines else str(error).splitlines()[0]}"
        ) from error
    except (OSError, EOFError, RuntimeError, ValueError, KeyError) as error:
        raise _Refused(f"it is no checkpoint that torch can read: {str(error).splitlines()[0]}") from error


def _state(content: Any) -> dict[str, Tensor]:
    """The tensors by name, at the top or under the usual names below it."""
    for _ in range(3):
        if not isinstance(content, dict) or not content:
            break
        others = sorted(str(name) for name, one in content.items() if not isinstance(one, Tensor))
        if not others:
            return {str(name): one for name, one in content.items()}
        inside = [name for name in _PLACES if isinstance(content.get(name), dict)]
        if not inside:
            shown = ", ".join(others[:5])
            raise _Refused(f"it holds more than tensors by name ({shown}), and nothing under {', '.join(_PLACES)}.")
        content = content[inside[0]]
    raise _Refused(f"it holds no tensors by name, but a {type(content).__name__}.")


def main(source: str, target: str) -> int:
    """Read `source`, write `target`; print as JSON what happened."""
    try:
        tensors = _state(_read(Path(source)))
        odd = [f"{name} ({type(one).__name__})" for name, one in tensors.items() if one.is_sparse or one.is_quantized]
        if odd:
            raise _Refused(f"it has tensors that safetensors cannot hold: {', '.join(odd[:5])}.")
        # One by one in a storage of its own: what is tied is written twice, and the loader checks that it is equal.
        save_file({name: one.detach().clone().contiguous() for name, one in tensors.items()}, target)
    except _Refused as error:
        print(json.dumps({"refused": str(error)}))
        return 1
    print(json.dumps({"tensors": len(tensors)}))
    return 0


if __name__ == "__main__":
    raise SystemExit(main(*sys.argv[1:]))
