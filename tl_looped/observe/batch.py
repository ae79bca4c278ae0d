"""The numbers of one batch of prompts, from activations as they come."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm

from tl_looped.engine.errors import InputError
from tl_looped.engine.schedule import HookSite
from tl_looped.observe.measure import READOUT, Measure
from tl_looped.observe.places import Places, key_of
from tl_looped.observe.runners import Runner
from tl_looped.observe.watching import SCORES

CHUNK = 2**24
"""How many log probabilities of one read-out are formed at a time: 64 MB in float32."""

_AT_ONCE = 2**18  # numbers of a component that are measured at once: calls on less cost more than what they compute
_BEFORE = {"previous": 1, "previous_two": 2}


def chunks(n: int, numbers: int) -> list[slice]:
    """So many rows (or positions) in pieces of at most `CHUNK` log probabilities, where each has so many."""
    size = max(1, CHUNK // numbers)
    return [slice(begin, min(begin + size, n)) for begin in range(0, n, size)]


@dataclass
class _Call:
    """An activation whose measures are still to be taken, and those that it is compared with."""

    place: int
    x: Tensor
    others: dict[str, tuple[Tensor, ...]]


class Batch:
    """The numbers of one batch of prompts; sees activations as they come.

    Args:
        runner: what runs.
        rows: the prompts, of one length.
        measures: what to take.
        places: where each measure reads, by its name.
        kept: measures to keep for every token.
        bar: moves with the loops.

    Attributes:
        measures: by the key of the places that they read.
        values: of each measure, [row, place, *axes].
        per_token: of those kept, [row, place, *axes, pos].
    """

    def __init__(
        self,
        runner: Runner,
        rows: Sequence[int],
        measures: Sequence[Measure],
        places: dict[str, Places],
        kept: tuple[str, ...],
        bar: tqdm,
    ):
        self.runner = runner
        tokens = torch.stack([runner.runs.rows.unpadded(row) for row in rows])
        self.next_tokens = torch.nn.functional.pad(tokens[:, 1:], (0, 1), value=-1)
        if runner.runs.prefix is not None:  # which tokens are seen by those before them, so that none predicts them
            prefix = torch.stack([runner.runs.prefix[row, runner.runs.rows.places(row)] for row in rows])
            self.next_tokens[:, :-1].masked_fill_(prefix[:, :-1] & prefix[:, 1:], -1)
        self.kept = kept
        self.bar = bar
        self.measures: dict[str, list[Measure]] = {}
        self.places: dict[str, Places] = {}
        for measure in measures:
            of = places[measure.name]
            self.measures.setdefault(of.key, []).append(measure)
            self.places[of.key] = of
        self.values: dict[str, Tensor] = {}
        self.per_token: dict[str, Tensor] = {}
        self._sites = {name: of.sites for name, of in places.items()}
        self._index = {name: {site: i for i, site in enumerate(of.sites)} for name, of in self.places.items()}
        self._pending: dict[str, list[_Call]] = {component: [] for component in self.measures}
        self._earlier: dict[HookSite, deque[Tensor]] = {}
        self._last: dict[HookSite, Tensor] = {}
        self._seen: set[HookSite] = set()
        self._extremes: list[tuple[HookSite, Tensor, Tensor]] = []  # looked at when all is done: one wait for a device
        self._loop = -1
        self._around: dict[tuple[str | None, int | None], int] = {
            (one.stack, one.loop): one.coordinates[0] for one in runner.schedule.passes if one.coordinates
        }

    def keep(self, site: HookSite, x: Tensor) -> None:
        """Keep an activation of the last loop, in the run to the end."""
        self._note_extremes(site, x)
        self._last[site.at(None)] = x

    def take(self, site: HookSite, x: Tensor) -> None:
        """See an activation; its measures are taken now, or with a few more if it is small."""
        if site in self._seen:
            raise InputError(
                f"{site.name!r} fired twice in one forward, so this model loops: only a LoopedModel says at which loop "
                "a layer runs."
            )
        self._seen.add(site)
        self._note_extremes(site, x)
        loop = self._around.get((site.stack, site.loop), site.loop)
        if loop is not None and loop > self._loop:
            self._loop = loop
            self.bar.update()
        key = key_of(site)
        pending = self._pending[key]
        if pending and pending[0].x.shape != x.shape:
            self._measure(key)
            pending = self._pending[key]
        pending.append(_Call(self._index[key][site], x, self._others(site, x)))
        if len(pending) * x.numel() >= _AT_ONCE or key == READOUT:
            self._measure(key)

    def _note_extremes(self, site: HookSite, x: Tensor) -> None:
        if x.is_floating_point():
            low, high = x.flatten(1).aminmax(dim=1)  # both NaN where one is
            self._extremes.append((site, low, high))

    def _others(self, site: HookSite, x: Tensor) -> dict[str, tuple[Tensor, ...]]:
        """What an activation is compared with."""
        if site.loop is None:
            return {}
        of, found = site.at(None), {}
        most = max((_BEFORE.get(measure.compare, 0) for measure in self.measures[key_of(site)]), default=0)
        if most:
            earlier = self._earlier.setdefault(of, deque(maxlen=most))
            found = {name: tuple(earlier)[:n] for name, n in _BEFORE.items() if len(earlier) >= n}
            earlier.appendleft(x)
        if of in self._last:
            found["last"] = (self._last[of],)
        return found

    def finish(self) -> None:
        """Take the measures that are left; raise for a place that was not seen, whose numbers would be missing."""
        for key in self.measures:
            self._measure(key)
            for site in self.places[key].sites:
                if site not in self._seen:
                    raise InputError(f"{site.name!r} did not fire in a forward of this model.")

    def first_not_finite(self) -> tuple[str, int] | None:
        """The first site seen that holds NaN or infinity, and the row; None where none does."""
        if not self._extremes:
            return None
        low = torch.stack([low for _, low, _ in self._extremes]).cpu()
        high = torch.stack([high for _, _, high in self._extremes]).cpu()
        wrong = ~high.isfinite()
        scores = torch.tensor([site.component == SCORES for site, _, _ in self._extremes])
        wrong |= ~low.isfinite() & ~scores[:, None]
        if not bool(wrong.any()):
            return None
        place, row = wrong.nonzero()[0].tolist()
        return self._extremes[place][0].name, row

    def _measure(self, key: str) -> None:
        """Take the measures of the pending calls of a component, all in one batch."""
        pending, self._pending[key] = self._pending[key], []
        for measure in self.measures[key]:
            calls = [call for call in pending if measure.compare == "none" or measure.compare in call.others]
            if not calls:
                continue
            compared = [call.others.get(measure.compare, ()) for call in calls]
            inputs = [_joined([call.x for call in calls]), *(_joined(list(one)) for one in zip(*compared, strict=True))]
            if key == READOUT:
                result = self._of_readouts(measure, inputs, self.places[READOUT].sites[calls[0].place])
            else:
                result = self._apply(measure, inputs, self.next_tokens.repeat(len(calls), 1))
            self._reduce(measure, [call.place for call in calls], result.unflatten(0, (len(calls), -1)))

    def _of_readouts(self, measure: Measure, inputs: list[Tensor], site: HookSite) -> Tensor:
        """A measure of log probabilities, which exist for some positions at a time."""
        batch, n_pos = inputs[0].shape[:2]
        results = []
        for piece in chunks(n_pos, batch * self.runner.vocabulary):
            said = [self.runner.log_probs(x[:, piece]) for x in inputs]
            highest = (
                said[0].flatten(1).amax(1)
            )  # NaN where one is, as where logits overflow: a mean would leave it out
            self._extremes.append((site, highest, highest))
            results.append(self._apply(measure, said, self.next_tokens[:, piece]))
        return torch.cat(results, dim=1)

    def _apply(self, measure: Measure, inputs: list[Tensor], next_tokens: Tensor) -> Tensor:
        """What a measure gives, as floats."""
        extra = {"next_tokens": next_tokens.to(inputs[0].device)} if measure.reads_tokens else {}
        result: object = measure.function(*inputs, **extra)
        n_pos = next_tokens.shape[1]
        wanted = (inputs[0].shape[0], *(n_pos if axis == "pos" else None for axis in measure.axes))
        if not isinstance(result, Tensor) or not _fits(result.shape, wanted):
            got = f"shape {tuple(result.shape)}" if isinstance(result, Tensor) else type(result).__name__
            raise InputError(
                f"measure {measure.name!r} must give [{', '.join(('batch', *measure.axes))}] of {measure.site!r} "
                f"of shape {tuple(inputs[0].shape)}, got {got}: correct its function or its axes."
            )
        return result if result.is_floating_point() and result.element_size() >= 4 else result.float()

    def _reduce(self, measure: Measure, places: list[int], result: Float[Tensor, "call row *axes"]) -> None:
        """Keep the mean over positions, and where it is asked for the numbers of all."""
        if "pos" in measure.axes:
            axis = 2 + measure.axes.index("pos")
            if measure.name in self.kept:
                self._write(self.per_token, measure, places, result.movedim(axis, -1))
            result = result.nanmean(axis)
        self._write(self.values, measure, places, result)

    def _write(
        self, where: dict[str, Tensor], measure: Measure, places: list[int], result: Float[Tensor, "call row *axes"]
    ) -> None:
        rows = result.transpose(0, 1)
        sites = self._sites[measure.name]
        if measure.name not in where:
            where[measure.name] = rows.new_full((rows.shape[0], len(sites), *rows.shape[2:]), float("nan"))
        found = where[measure.name]
        if found.shape[2:] != rows.shape[2:]:
            raise InputError(
                f"measure {measure.name!r} gave shape {tuple(found.shape[2:])} for each prompt at one place, and "
                f"{tuple(rows.shape[2:])} at {sites[places[0]].name!r}: all must have the same."
            )
        found[:, places] = rows.to(found.dtype)


def _fits(shape: Sequence[int], wanted: Sequence[int | None]) -> bool:
    """Whether a shape has the sizes wanted, None being any."""
    return len(shape) == len(wanted) and all(want in (None, size) for want, size in zip(wanted, shape, strict=True))


def _joined(tensors: list[Tensor]) -> Tensor:
    """Batches as one."""
    return tensors[0] if len(tensors) == 1 else torch.cat(tensors)
