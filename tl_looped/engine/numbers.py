"""Number formats and places of models, and arithmetic that several rooms need: widths, lengths, medians."""

from __future__ import annotations

import platform
import warnings

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tl_looped.engine.errors import InputError, nearest

DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32, "float64": torch.float64}
_ADVISED: set[torch.dtype] = set()
_X86 = ("x86_64", "AMD64")  # of other processors torch does not say what they have


def check_dtype(dtype: torch.dtype | str) -> torch.dtype:
    """The number format of a model, given itself or its name ("bfloat16"), or an InputError that names the choices."""
    found = DTYPES.get(dtype.removeprefix("torch.")) if isinstance(dtype, str) else dtype
    if found is None or found not in DTYPES.values():
        hint = nearest(dtype, DTYPES) if isinstance(dtype, str) else ""
        raise InputError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}.{hint}")
    return found


def advise(device: torch.device, dtype: torch.dtype) -> None:
    """Say, once for a format, that a model will be slow in it on this CPU, which has no arithmetic for it."""
    kinds = {torch.bfloat16: "bf16", torch.float16: "fp16"}
    if device.type != "cpu" or dtype not in kinds or dtype in _ADVISED or platform.machine() not in _X86:
        return
    _ADVISED.add(dtype)
    if not (
        torch.backends.mkldnn.is_available() and getattr(torch.ops.mkldnn, f"_is_mkldnn_{kinds[dtype]}_supported")()
    ):
        warnings.warn(
            f"this CPU has no arithmetic for {dtype}, so the model runs several times slower than in float32: pass "
            "dtype=torch.float32, which holds the same weights exactly.",
            stacklevel=4,
        )


def check_device(device: torch.device | str | None) -> torch.device:
    """Where to put a model; None for a GPU where there is one. An InputError where nothing can be put there."""
    wanted = device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.empty(0, device=wanted).device
    except (RuntimeError, AssertionError, NotImplementedError) as error:  # by an unknown name, by a missing driver
        raise InputError(f"device={device!r} can't be used here: {error}") from error


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """Float32 at least: half precision is for running models, not for measuring them."""
    return torch.promote_types(dtype, torch.float32)


def wide(x: Float[Tensor, "*dims"]) -> Float[Tensor, "*dims"]:
    """The same numbers in float32 at least."""
    return x.to(wide_dtype(x.dtype))


def log_probs_of(logits: Float[Tensor, "*dims d_vocab"]) -> Float[Tensor, "*dims d_vocab"]:
    """Log probabilities of logits, in nats, in float32 at least."""
    return wide(logits).log_softmax(-1)


def length(x: Float[Tensor, "*dims d_model"]) -> Float[Tensor, "*dims"]:
    """‖x‖ over the last axis, also where its squares overflow or vanish; NaN where the dtype can't hold ‖x‖ itself."""
    norm = torch.linalg.vector_norm(x, dim=-1)
    info = torch.finfo(x.dtype)
    exact = norm.isfinite() & (norm > (info.tiny / info.eps) ** 0.5)
    if x.device.type == "cpu" and bool(exact.all()):  # a device would have to be waited for
        return norm
    largest = x.abs().amax(-1, keepdim=True).clamp(min=info.tiny)
    scaled = largest[..., 0] * torch.linalg.vector_norm(x / largest, dim=-1)
    return torch.where(exact, norm, scaled.masked_fill(scaled.isinf(), float("nan")))


def ratio(part: Float[Tensor, "*dims"], whole: Float[Tensor, "*dims"]) -> Float[Tensor, "*dims"]:
    """One divided by the other; NaN where the whole is zero."""
    return torch.where(whole == 0, float("nan"), part / whole)


def unit(x: Float[Tensor, "*dims d_model"]) -> Float[Tensor, "*dims d_model"]:
    """The unit vector x / ‖x‖, in float32 at least; NaN for a zero vector."""
    x = wide(x)
    return x / length(x)[..., None]


def cosine(x: Float[Tensor, "*dims d_model"], y: Float[Tensor, "*dims d_model"]) -> Float[Tensor, "*dims"]:
    """The cosine of two vectors, in float32 at least, in [−1, 1]; NaN where either is zero."""
    return (unit(x) * unit(y)).sum(-1).clamp(-1, 1)  # clamp keeps NaN


# Over one axis, NaN left out; NaN where nothing is left.


def median(x: Float[Tensor, "*dims"], dim: int = -1) -> Float[Tensor, "*rest"]:
    """The median: of an even count the mean of the middle two, where torch's own takes the lower one."""
    x = wide(x).contiguous()  # of an expanded tensor torch gives a number that is not in it
    lower, upper = x.nanmedian(dim).values, -(-x).nanmedian(dim).values
    return torch.where(lower == upper, lower, lower / 2 + upper / 2)


def quantile(x: Float[Tensor, "*dims"], q: float, dim: int = -1) -> Float[Tensor, "*rest"]:
    """A quantile, linear between two numbers; torch.nanquantile takes no more than 16 million at once."""
    x = wide(x).movedim(dim, -1)
    place = q * ((~x.isnan()).sum(-1, keepdim=True) - 1).clamp(min=0).double()
    ordered = x.sort(-1).values  # NaN last
    lower, upper = (ordered.gather(-1, end.long()) for end in (place.floor(), place.ceil()))
    return torch.where(lower == upper, lower, lower.lerp(upper, place.frac().to(x.dtype)))[..., 0]


def interval(values: Float[Tensor, "*dims prompt"], resamples: int, seed: int) -> tuple[Tensor, Tensor]:
    """95 % interval of the mean over prompts, by resampling these, the same for all else: percentiles, [*dims].

    Of one prompt there is none: NaN.
    """
    if values.shape[-1] < 2:
        none = torch.full(values.shape[:-1], torch.nan, dtype=torch.float64)
        return none, none
    from scipy.stats import bootstrap  # slow to import, and few need it

    x = values.double().cpu().numpy()
    options = {"n_resamples": resamples, "batch": 256, "method": "percentile", "rng": np.random.default_rng(seed)}
    found = bootstrap((x,), np.mean, axis=-1, **options).confidence_interval
    # Within the values, which a mean of equal ones leaves by a rounding.
    low, high = (torch.as_tensor(np.clip(end, x.min(-1), x.max(-1))) for end in found)
    return low, high


# From which loop on: of a condition in every loop.


def held_to_end(met: Bool[Tensor, "loop *dims"]) -> Int[Tensor, "*dims"]:
    """For how many loops in a row, up to the last, the condition is met."""
    return met.flip(0).long().cumprod(0).sum(0)


def met_from(met: Bool[Tensor, "loop *dims"]) -> Float[Tensor, "*dims"]:
    """The first loop from which on the condition is met until the end; NaN where it is not met in the end."""
    held = held_to_end(met)
    return (len(met) - held).float().masked_fill(held == 0, float("nan"))


def first_met(met: Bool[Tensor, "loop *dims"]) -> Float[Tensor, "*dims"]:
    """The first loop in which the condition is met; NaN for never."""
    return met.long().argmax(0).float().masked_fill(~met.any(0), float("nan"))
