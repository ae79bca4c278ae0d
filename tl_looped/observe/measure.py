"""A measure: a tensor function, and where in a model it reads."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from torch import Tensor

from tl_looped.engine.errors import InputError, nearest
from tl_looped.engine.identity import identity

Compare = Literal["none", "previous", "previous_two", "last"]

READOUT = "readout"
"""What the model would say if it stopped: the one site that is no hook point."""


@dataclass(frozen=True)
class Measure:
    """A number for every place where a site fires: every layer call, every loop, or once.

    Attributes:
        name: what it is called in results, such as "step".
        label: what stands at a plot's axis, such as "‖x_t − x_{t−1}‖ / ‖x_t‖".
        unit: "nats", "relative L2", "cosine", ...; "" for a share.
        site: what it reads, by its short name or component: of a layer ("resid_post", "pattern", "mlp.hook_post"), of
            a loop ("state_post", "injection"), of a run ("embed"); or "readout", the log probabilities of what the
            model would say if it stopped after a loop, in nats, [batch, pos, d_vocab].
        function: from the activation, batch first, to [batch, *axes], each row by itself (rows may come from several
            places). Where it compares, it is called with one or two more activations, those of `compare`. Of read-outs
            it sees some positions at a time, so there "pos" is the first of its axes.
        compare: "previous": the same site and layer one loop earlier; "previous_two": one and two loops earlier;
            "last": in the last loop. Undefined (NaN) where there is no such loop, as in layers that run once.
        axes: what the function's result has besides the batch: (), ("pos",), ("head",), ("head", "pos").
        reads_tokens: whether it is also called with `next_tokens`, the token after each position, [batch, pos], −1
            after the last, and where that token is seen, as in a prefix.
    """

    name: str
    label: str
    unit: str
    site: str
    function: Callable[..., Tensor]
    compare: Compare = "none"
    axes: tuple[str, ...] = ()
    reads_tokens: bool = False

    def describe(self) -> str:
        """A text that is another one where the measure is: two measures of one name are not mixed in one file."""
        return f"{self.site}, {self.compare}, {self.axes}, {self.reads_tokens}: {identity(self.function)}"


def check_measures(measures: object, per_token: Sequence[str]) -> tuple[Measure, ...]:
    """The measures, each of its own name, and those to keep for every token among them.

    Raises:
        InputError: the message says which measure, and what to change.
    """
    if not isinstance(measures, Sequence) or not measures or not all(isinstance(one, Measure) for one in measures):
        raise InputError(f"measures must be a list of at least one Measure, got {measures!r}.")
    names = [measure.name for measure in measures]
    for measure in measures:
        if names.count(measure.name) > 1:
            raise InputError(f"there are two measures {measure.name!r}: give each its own name.")
        if measure.compare not in get_args(Compare):
            raise InputError(
                f"measure {measure.name!r}: compare must be one of {get_args(Compare)}, got {measure.compare!r}."
            )
        if measure.site == READOUT and measure.axes[:1] != ("pos",):
            raise InputError(
                f"measure {measure.name!r} reads read-outs, which come some positions at a time: it must give a number "
                f"for each, with axes=('pos', ...), got {measure.axes}."
            )
    for name in per_token:
        if name not in names:
            raise InputError(f"per_token: there is no measure {name!r}, but {names}.{nearest(name, names)}")
        if "pos" not in measures[names.index(name)].axes:
            raise InputError(f"per_token: the measure {name!r} has no numbers for each token (no axis 'pos').")
    return tuple(measures)
