"""In which number format and where a model runs, and in which format a measure is computed."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from tl_looped.engine.errors import InputError, nearest

DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32, "float64": torch.float64}


def check_dtype(dtype: torch.dtype | str) -> torch.dtype:
    """The number format of a model, given itself or its name ("bfloat16"), or an InputError that names the choices."""
    found = DTYPES.get(dtype.removeprefix("torch.")) if isinstance(dtype, str) else dtype
    if found is None or found not in DTYPES.values():
        hint = nearest(dtype, DTYPES) if isinstance(dtype, str) else ""
        raise InputError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}.{hint}")
    return found


def check_device(device: torch.device | str | None) -> torch.device:
    """Where to put a model; None for a GPU where there is one. An InputError where nothing can be put there."""
    wanted = device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.empty(0, device=wanted).device
    except (RuntimeError, AssertionError, NotImplementedError) as error:  # by an unknown name, by a missing driver
        raise InputError(f"device={device!r} can't be used here: {error}") from error


def wide(x: Float[Tensor, "*dims"]) -> Float[Tensor, "*dims"]:
    """The same numbers in float32 at least: half precision is for running models, not for measuring them."""
    return x if x.element_size() >= 4 else x.float()
