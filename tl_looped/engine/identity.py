"""What made a result, in short texts that are equal only where the things are: weights, tensors, functions."""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from tl_looped.engine.errors import InputError

_SAMPLES = 64  # of each weight: enough to tell two trainings apart, and quick for a model of any size
_DEEPEST = 4  # functions in functions; also ends a function that holds itself


def digest(*tensors: Tensor) -> str:
    """A text that stands for some tensors: their shapes, dtypes and numbers, whatever their device."""
    total = hashlib.sha256()
    for tensor in tensors:
        total.update(f"{tuple(tensor.shape)} {tensor.dtype};".encode())
        flat = tensor.detach().cpu().contiguous().flatten()
        if flat.numel():
            total.update(flat.view(torch.uint8).numpy().data)
    return total.hexdigest()[:16]


def weights_digest(model: object) -> str:
    """A text that stands for a model's weights and buffers; reads all of them once.

    Raises:
        InputError: the model is not a torch module, so its weights can't be read.
    """
    if not isinstance(model, nn.Module):
        raise InputError(f"the weights of a {type(model).__name__} can't be read, so no file can be kept for it.")
    named = [*model.named_parameters(), *model.named_buffers()]
    names = torch.frombuffer(bytearray(" ".join(name for name, _ in named).encode() or b" "), dtype=torch.uint8)
    return digest(names, *(tensor for _, tensor in named))


def fingerprint(model: nn.Module) -> str:
    """A text that stands for a model's weights, from some evenly spaced values of each: quick at any size.

    It tells trainings apart, not an edit of single numbers; `weights_digest` does.
    """
    digest = hashlib.sha256()
    for name, weight in model.named_parameters():
        flat = weight.detach().flatten()
        at = torch.linspace(0, len(flat) - 1, min(_SAMPLES, len(flat)), dtype=torch.float64, device=flat.device).long()
        digest.update(f"{name} {tuple(weight.shape)}".encode())
        digest.update(flat[at].double().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


def identity(value: Any, depth: int = 0) -> str:
    """A text that stands for a function with all that it holds: another threshold or another body gives another text.

    What it reads from its module is not followed, and of objects other than functions, tensors and plain values only
    their class is known.
    """
    if isinstance(value, Tensor):
        return f"tensor {digest(value)}"
    if value is None or isinstance(value, (bool, int, float, str)):
        return repr(value)
    if depth > _DEEPEST:
        return type(value).__name__
    if isinstance(value, (tuple, list)):
        return f"({', '.join(identity(one, depth + 1) for one in value)})"
    if isinstance(value, Mapping):
        return f"{{{', '.join(f'{key}={identity(one, depth + 1)}' for key, one in value.items())}}}"
    if isinstance(value, partial):
        return f"{identity(value.func, depth)} with {identity(value.args, depth)} {identity(value.keywords, depth)}"
    inner = inspect.unwrap(value) if callable(value) else value
    if not inspect.isroutine(inner):
        return f"{type(inner).__module__}.{type(inner).__qualname__}"
    name = f"{getattr(inner, '__module__', '')}.{inner.__qualname__}"
    if not inspect.isfunction(inner):
        return name
    held = [cell.cell_contents for cell in inner.__closure__ or ()]
    held += [*(inner.__defaults__ or ()), *(inner.__kwdefaults__ or {}).values()]
    held += [one for one in inner.__code__.co_consts if not inspect.iscode(one)]
    body = hashlib.sha256(inner.__code__.co_code + repr(inner.__code__.co_names).encode()).hexdigest()[:8]
    return f"{name} {body} {identity(held, depth + 1)}"


def differences(there: Mapping[str, Any], here: Mapping[str, Any]) -> str:
    """In what one call differs from another, in words, of what this one says; empty where it does not."""
    return "; ".join(_difference(key, there.get(key), here[key]) for key in here if there.get(key) != here[key])


def _difference(key: str, there: Any, here: Any) -> str:
    if isinstance(there, dict) and isinstance(here, dict):
        names = [name for name in {**there, **here} if there.get(name) != here.get(name)]
        return f"the {key} {', '.join(map(repr, names))} differ"
    return f"{key} is {there!r} there, {here!r} here"
