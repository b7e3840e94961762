"""Rates in a closed loop: what the encoders of one rank measure, and the rates they announce to meet a target.

Each encoder has a :class:`StreamRate`. With every residual it learns how large the residual was and what the codec left
of it, and predicts both for the next one at every rate. For an error (``nmse_db``) each stream decides by itself; for a
size (``bits``, ``bytes_per_step``) one relative error is sought for all of them, as in reverse water-filling, at which
their frames have that size. What was missed is made up for in the steps after.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from compactdist import kernels
from compactdist.codecs.base import Terms
from compactdist.state.host_copy import HostCopy
from compactdist.state.site_key import is_under, without_request
from compactdist.state.target import Met, Target
from compactdist.wire import HEADER_NBYTES

__all__ = ["Choice", "Measured", "RateControl", "StreamRate"]

_DB_PER_BIT = 6.02
_KEYFRAME_DB = 4.0
_FIRST_CHANGE = 0.03
"""Energy of the first residual over the tensor's, before any was seen."""
_MARGIN = 1.12
"""A lower rate must promise an error this much below what is allowed, and one that misses by less is kept: 0.5 dB."""
_ROOM = 2.5
"""By how much, at most, one step may be better or worse than the target, to make up for others."""
_SETTLES_AFTER = 16
"""Residuals until errors above the target may make up for all that was gained before."""
_HOPELESS = 6.0
"""Errors count as at most so many times the target when others make up for them."""
_ANOTHER = 0.5
"""Energy of a residual over its tensor's, above which the tensor does not go on from the one before. On the recorded
traces, down to 4 steps, it is 0.48 at most, and 1.3 to 4.4 where a prompt changes."""
_FORGET = 0.98
"""Weight of older steps beside those of one step later, in requests of many steps."""
_LEARN, _LEARN_OTHERS = 0.6, 0.2
_BISECTIONS = 50


Key = tuple[str, int] | tuple[str, int, int]
"""An encoder: its site, the rank it sends to, and the number of the part that it carries, if it is a further one."""


@dataclass(frozen=True, slots=True)
class Measured:
    """Sums of squares of one tensor.

    Attributes:
        energy: of the tensor.
        residual: of what it differed by from the prediction.
        error: of what it differs by from its reconstruction.
    """

    energy: float
    residual: float
    error: float

    @classmethod
    def of(cls, x: Tensor, terms: Terms, value: Tensor) -> Measured:
        """The sums of a tensor, its prediction and its reconstruction, all flat; the host waits for a device."""
        return cls(*kernels.energies(x, terms, value).tolist())


@dataclass(frozen=True, slots=True)
class Choice:
    """What a frame announces for the next one.

    Attributes:
        rate: number of the rate; 0: no change.
        keyframe: the next frame is a keyframe, which costs no more than a residual that would do.
    """

    rate: int = 0
    keyframe: bool = False


@dataclass
class _Sums:
    """Sums over the residual frames of a request."""

    error: float = 0.0
    energy: float = 0.0
    wire_bytes: int = 0
    elements: int = 0

    def __add__(self, other: _Sums) -> _Sums:
        return _Sums(
            self.error + other.error,
            self.energy + other.energy,
            self.wire_bytes + other.wire_bytes,
            self.elements + other.elements,
        )


class StreamRate:
    """What one encoder has measured, and the rate it wants.

    Args:
        control: of the rank.
        before: the stream of the last request, whose frames tell what to expect; ``None``: there was none.
    """

    def __init__(self, control: RateControl, before: StreamRate | None = None) -> None:
        self._control = control
        # by number of the residual: its `_change` in the last request that had so many residuals
        self._told: tuple[float, ...] = ()
        self.changes: list[float] = []
        self.rate = 0
        self.planned = 0
        self.sizes: tuple[int, ...] = ()
        self.elements = 0
        self._loss: list[float] = []
        self._seen: set[int] = set()
        self._last: Measured | None = None
        self._awaited: list[tuple[Hashable, HostCopy, int]] = []
        self._catching_up = threading.Lock()
        self.sums = _Sums()
        self._recent_error = self._recent_energy = 0.0
        if before is not None:
            before.catch_up(asked=True)
            self._told = (*before.changes, *before._told[len(before.changes) :])
            self._loss, self._seen = list(before._loss), set(before._seen)

    def begin(self, step: int, epoch: int, elements: int, sizes: Iterable[int], rate: int) -> None:
        """Say how the stream codes now.

        Args:
            step: of the frame; with the first frame of another step, sizes are shared out anew.
            epoch: of the frame.
            elements: of the tensor.
            sizes: bytes of a frame at each rate.
            rate: number of the rate in use.
        """
        self._control.begin_step((epoch, step))
        self.elements, self.sizes, self.rate = elements, tuple(sizes), rate
        if len(self._loss) != len(self.sizes):
            self._loss = [-_DB_PER_BIT * 8 * nbytes / max(1, elements) for nbytes in self.sizes]
            self._seen.clear()

    def relative_errors(self, measured: Measured | None = None) -> list[float]:
        """The predicted NMSE of the next residual at each rate.

        Args:
            measured: of the frame that is on its way; ``None``: of the last one that left.
        """
        before = self._next_residual(measured)
        loss = self._learnt(measured, self.rate)
        return [min(before, before * 10 ** (one / 10)) for one in loss]

    def _next_residual(self, measured: Measured | None) -> float:
        """The predicted energy of the next residual over the tensor's; ``measured`` as for ``relative_errors``."""
        last = measured or self._last
        if last is None or last.energy <= 0:
            return self._told[0] if self._told else _FIRST_CHANGE
        change = self._change(measured) if measured is not None else self.changes[-1]
        return change * self._growth(len(self.changes) + (measured is not None)) + last.error / last.energy

    def _expected(self) -> Measured:
        """What will be measured of the frame that is being made, at the rate that was announced for it."""
        energy = 1.0 if self._last is None else self._last.energy
        return Measured(energy, energy * self._next_residual(None), energy * self.relative_errors()[self.rate - 1])

    def _change(self, measured: Measured) -> float:
        """A residual's energy, less the last frame's error (leaving a tenth at least), over the tensor's energy."""
        before = 0.0 if self._last is None else self._last.error
        return max(0.1 * measured.residual, measured.residual - before) / measured.energy

    def _growth(self, number: int) -> float:
        """How much larger the next residual will be: as in the last request, or with room for what is not known yet."""
        told = self._told
        if not self._is_told(number):
            return 1.0 + 1.0 / max(1, number)
        if number == 0 or told[number - 1] <= 0:
            return 1.0
        return min(4.0, max(0.25, told[number] / told[number - 1]))

    def _is_told(self, number: int) -> bool:
        """Whether the last request had a residual of this number."""
        return number < len(self._told)

    def _learnt(self, measured: Measured | None, rate: int) -> list[float]:
        """What each rate leaves of a residual, in decibels, after this one too, which was sent at ``rate``."""
        if measured is None or not measured.residual > 0 or not measured.error > 0:
            return self._loss
        mine = rate - 1
        off = 10 * math.log10(measured.error / measured.residual) - self._loss[mine]
        off = max(-20.0, min(20.0, off))
        loss = list(self._loss)
        for at in range(len(loss)):
            known = at in self._seen
            loss[at] += off * (_LEARN if at == mine or not known else _LEARN_OTHERS)
        for at in range(1, len(loss)):
            loss[at] = min(loss[at], loss[at - 1])
        return loss

    def choose(self, measured: Measured | None, keyframe_nbytes: int, *, keyframe: bool) -> Choice:
        """What the frame that is being made announces. Nothing is counted.

        Args:
            measured: the frame's tensor; ``None``: it is a keyframe, or nobody has measured it yet.
            keyframe_nbytes: bytes of a keyframe.
            keyframe: which of the two it is.
        """
        self.catch_up()
        target = self._control.target
        if target.kind != "nmse_db":
            wanted = self.planned or (self._control.first_rate(self) if keyframe else 0)
            return Choice(0 if wanted == self.rate else wanted)
        if measured is None and not keyframe:
            measured = self._expected()
        allowed = self._allowed(target.nmse, measured)
        errors = self.relative_errors(measured)
        rate = next((at + 1 for at, error in enumerate(errors) if error <= allowed), len(errors))
        if not keyframe and rate != self.rate:
            lower, mine = rate < self.rate, errors[self.rate - 1]
            if (lower and errors[rate - 1] * _MARGIN > allowed) or (not lower and mine <= allowed * _MARGIN):
                rate = self.rate
        misses, fits = errors[rate - 1] > allowed, self.sizes[rate - 1] >= keyframe_nbytes
        again = not keyframe and misses and fits and self._keyframe_error(keyframe_nbytes) < errors[rate - 1]
        return Choice(0 if rate == self.rate else rate, again)

    def _keyframe_error(self, keyframe_nbytes: int) -> float:
        """About the NMSE of a keyframe of this size: within 3 dB what scalar quantizers leave of Gaussian values."""
        bits = 8 * (keyframe_nbytes - HEADER_NBYTES) / max(1, self.elements)
        return float(10 ** ((_KEYFRAME_DB - _DB_PER_BIT * bits) / 10))

    def _allowed(self, asked: float, measured: Measured | None) -> float:
        """The NMSE that the next residual may have, so that it and those before it meet what is asked."""
        error, energy, last = self._recent_error, self._recent_energy, self._last
        if measured is not None:
            error = _FORGET * error + self._counted(asked, measured)
            energy, last = _FORGET * energy + measured.energy, measured
        if last is None or last.energy <= 0:
            return asked
        left = (asked * (energy + last.energy) - error) / last.energy
        number = len(self.changes) + (measured is not None)
        room = _ROOM if self._is_told(number) else 1 + (_ROOM - 1) * min(1.0, number / _SETTLES_AFTER)
        return max(asked / _ROOM, min(asked * room, left))

    def sent(self, measured: Measured | HostCopy | None, wire_bytes: int, next_rate: int = 0) -> None:
        """Count a frame that is on its way.

        Args:
            measured: sums of the frame's tensor, or a copy of them that a device makes; ``None``: it is a keyframe. A
                copy is read when the stream makes its next frame, or when rates are shared out a full step later.
            wire_bytes: of the frame.
            next_rate: the rate that it announces; 0: none.
        """
        self._control.counted(wire_bytes, self.elements, residual=measured is not None)
        if measured is None:
            if not self.planned:
                self._control.begun(self)
        else:
            self.sums.wire_bytes += wire_bytes
            self.sums.elements += self.elements
            if isinstance(measured, HostCopy):
                self._awaited.append((self._control.at, measured, self.rate))
            else:
                self._learn(measured, self.rate)
        self.rate = next_rate or self.rate

    def catch_up(self, besides: Hashable = None, *, asked: bool = False, wait: bool = True) -> None:
        """Learn what devices have measured of the frames sent so far.

        Args:
            besides: stop at the first frame of this step; ``None``: take the frames of all steps.
            asked: the user asked what was met. Otherwise a call waits, and ``RateControl.late`` counts each wait.
            wait: wait for measurements that have not arrived; ``False``: leave them for the next call.
        """
        with self._catching_up:  # whoever asks what was met may come while a request ends in another thread
            while self._awaited and (besides is None or self._awaited[0][0] != besides):
                if not (wait or self._awaited[0][1].is_there):
                    return
                _, copy, rate = self._awaited.pop(0)
                self._control.late += not (asked or copy.is_there)
                measured = Measured(*copy.read())
                if math.isfinite(measured.energy + measured.residual + measured.error):
                    self._learn(measured, rate)

    def _learn(self, measured: Measured, rate: int) -> None:
        """Count the error of a residual that was sent at a rate."""
        self._loss = self._learnt(measured, rate)
        if measured.energy > 0:
            self.changes.append(self._change(measured))
        self._seen.add(rate - 1)
        self.sums.error += measured.error
        self.sums.energy += measured.energy
        asked = self._control.target.nmse
        self._recent_error = _FORGET * self._recent_error + self._counted(asked, measured)
        self._recent_energy = _FORGET * self._recent_energy + measured.energy
        self._last = measured

    def _counted(self, asked: float, measured: Measured) -> float:
        """The error that later frames make up for: all of the first frame's, else at most ``_HOPELESS`` targets."""
        if self._last is None:
            return measured.error
        return min(measured.error, _HOPELESS * asked * measured.energy)

    def is_hopeless(self, measured: Measured) -> bool:
        """Whether the tensor is another one than before, and its residual misses what is asked for by far."""
        asked = self._control.target.nmse
        is_another = measured.residual > _ANOTHER * measured.energy
        return is_another and measured.error > _HOPELESS * asked * measured.energy

    def rest(self) -> None:
        """The stream sends nothing until it begins anew: no bytes are set aside for it."""
        self.sizes = ()

    @property
    def is_known(self) -> bool:
        """Whether the stream has begun."""
        return bool(self.sizes)


@dataclass
class RateControl:
    """The rates of all encoders of one rank. Any thread may ask what was met, while others begin streams.

    Attributes:
        target: what they are chosen for.
        at: epoch and step of the last frame; ``None`` before the first.
        late: how often the host waited in a call for what a device had measured in an earlier one.
    """

    target: Target
    _streams: dict[Key, StreamRate] = field(default_factory=dict)
    _ended: dict[Key, StreamRate] = field(default_factory=dict)
    """By the keys of their sites outside any request: of streams that were let go, the last."""
    _forgotten: _Sums = field(default_factory=_Sums)
    """Of streams that were let go, as those of a request that has ended: what they sent was sent all the same."""
    at: Hashable = None
    late: int = 0
    _steps: int = 0
    _under_way: bool = False
    _over: float = 0.0
    _wire_bytes: int = 0
    _elements: int = 0

    def stream(self, key: Key) -> StreamRate:
        """The rate of an encoder that begins; what one of this site saw in the last request is used."""
        before = self._streams.get(key) or self._ended.get(_without_request(key))
        made = self._streams[key] = StreamRate(self, before)
        return made

    def begin_step(self, step: Hashable) -> None:
        """Called before each frame: at another step than the last frame's, sizes are shared out for the step after."""
        if step == self.at:
            return
        before, self.at = self.at, step
        streams = [stream for stream in tuple(self._streams.values()) if stream.is_known]
        for stream in streams:
            stream.catch_up(besides=before)  # a device may not have come further, and sizes must not depend on that
        self._steps += self._under_way
        self._under_way = False
        if self.target.kind != "nmse_db" and streams:
            self._share_out(streams)

    def _share_out(self, streams: list[StreamRate]) -> None:
        """Plan the rates of the step after this one: the common relative error at which the frames have the size."""
        in_step = [stream.sizes[stream.rate - 1] for stream in streams]
        budget, before = self.target.value, self._sums()
        so_far = budget * self._steps
        if self.target.kind == "bits":
            so_far = budget * before.elements / 8
            budget *= sum(stream.elements for stream in streams) / 8
        left = so_far + 2 * budget - before.wire_bytes - sum(in_step)  # the step that begins is spoken for
        left = max(budget / _ROOM, min(budget * _ROOM, left))
        errors = [stream.relative_errors() for stream in streams]
        low, high = -40.0, 40.0  # powers of two
        for _ in range(_BISECTIONS):
            middle = (low + high) / 2
            if _nbytes(streams, _at_level(errors, 2**middle)) > left:
                low = middle
            else:
                high = middle
        candidates = [_at_level(errors, 2**high), _at_level(errors, 2**low)]
        chosen = min(candidates, key=lambda rates: abs(_nbytes(streams, rates) - left))
        for stream, rate in zip(streams, chosen, strict=True):
            stream.planned = rate

    def _sums(self) -> _Sums:
        """Of all streams since the last restart, those that rest or were let go too."""
        return sum((stream.sums for stream in tuple(self._streams.values())), self._forgotten)

    def first_rate(self, stream: StreamRate) -> int:
        """The rate of a stream's first residual; 0: the codec's own start.

        Its frame is nearest to the size asked for, less what other streams took too much.
        """
        if self.target.kind != "bits":
            return 0
        size = self.target.value * stream.elements / 8 - self._over
        return 1 + min(range(len(stream.sizes)), key=lambda at: abs(stream.sizes[at] - size))

    def begun(self, stream: StreamRate) -> None:
        """Count the size of a stream's first residual, whose rate was announced."""
        rate = self.first_rate(stream)
        if rate:
            self._over += stream.sizes[rate - 1] - self.target.value * stream.elements / 8

    def counted(self, wire_bytes: int, elements: int, *, residual: bool) -> None:
        """Count a frame."""
        self._under_way = self._under_way or residual
        self._wire_bytes += wire_bytes
        self._elements += elements

    def restart(self) -> None:
        """Begin another request; what the streams saw in this one tells what to expect."""
        self._steps, self.at, self._wire_bytes, self._elements = 0, None, 0, 0
        self._under_way, self._over, self._forgotten = False, 0.0, _Sums()
        for key in list(self._streams):
            self.stream(key)

    def forget(self, prefix: str) -> None:
        """Let go of the streams whose site lies under a prefix."""
        for key in list(self._streams):
            if is_under(key[0], prefix):
                ended = self._ended[_without_request(key)] = self._streams.pop(key)
                ended.catch_up(asked=True)
                self._forgotten += ended.sums

    def met(self, *, wait: bool = True) -> Met:
        """What came of the target since the last reset; waits for what devices have measured, unless told not to."""
        for stream in tuple(self._streams.values()):
            stream.catch_up(asked=True, wait=wait)
        sums = self._sums()
        error, energy, wire, elements = sums.error, sums.energy, sums.wire_bytes, sums.elements
        nmse_db = (10 * math.log10(error / energy) if error else -math.inf) if energy else math.nan
        steps = max(self._steps + self._under_way, 1)
        return Met(
            self.target,
            nmse_db,
            8 * wire / elements if elements else math.nan,
            wire / steps if elements else math.nan,
            8 * self._wire_bytes / self._elements if self._elements else math.nan,
        )

    def rates(self) -> dict[Key, int]:
        """The rate in use of each stream."""
        return {key: stream.rate for key, stream in tuple(self._streams.items()) if stream.is_known}


def _without_request(key: Key) -> Key:
    _, site = without_request(key[0])
    return (site, key[1]) if len(key) == 2 else (site, key[1], key[2])


def _at_level(errors: Sequence[Sequence[float]], level: float) -> list[int]:
    """Of each stream the lowest rate whose error reaches the level, else the highest."""
    return [next((at + 1 for at, error in enumerate(one) if error <= level), len(one)) for one in errors]


def _nbytes(streams: Sequence[StreamRate], rates: Sequence[int]) -> int:
    return sum(stream.sizes[rate - 1] for stream, rate in zip(streams, rates, strict=True))
