"""What was really sent: counters per call site, totals, and why calls were not compressed.

Bytes are those this rank puts on the link: an all-gather counts its input once per other rank, an all-to-all its chunks
for the others, a broadcast the root's tensor once per other rank, a send the message. Reductions count what the
bandwidth-optimal algorithm sends (nccl-tests' bus factors). A receive counts nothing among them: its bytes are kept
apart, in ``received_raw_bytes`` and ``received_wire_bytes``.
"""

from __future__ import annotations

import math
import threading
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from enum import Enum
from typing import Any

__all__ = ["GroupStats", "PassReason", "SiteStats", "Stats", "decibel"]


class PassReason(str, Enum):
    """Why a call was not compressed: the short name that is counted, and the sentence that ``explain`` shows.

    A member is its short name: ``PassReason.SMALL == "small"``, also as a key of a dict and in ``"+".join``. A call
    whose parts passed for several reasons has their names joined by ``+`` (:meth:`joined`).
    """

    text: str

    NO_STEP = "no-step", "no step, key or attached module had been seen yet"
    OP = "op", "this operation is not compressed"
    DTYPE = "dtype", "not float32, float16 or bfloat16"
    WEIGHTS = "weights", "weights or gradients, by the code of torch that made the call"
    SMALL = "small", "fewer elements than min_numel"
    UNASKED = "not-asked", "this operation is compressed only where the policy names a codec"
    POLICY = "policy", "the policy said so"
    AUTOGRAD = "autograd", "the tensor requires grad, or the call is part of an autograd Function or a backward pass"
    WORLD_SIZE = "world-size-1", "the group has one rank"
    BUDGET = "state-budget", "state_budget_bytes of this rank or a peer is used up"
    BUDGET_OF_PAIR = (
        "state-budget-pair",
        "state_budget_bytes of this rank or a peer is used up, and no site makes room: only two ranks know these bytes",
    )
    UNEVEN = "uneven", "chunks of unequal sizes"
    VARIES = "shape-varies", "the site's tensors have changed more than eight times since the last reset"
    DEVICE = "device", "not possible on this device"
    PEER = "peer-passed", "the sender let it pass through"

    def __new__(cls, name: str, text: str) -> PassReason:
        member = str.__new__(cls, name)
        member._value_ = name
        member.text = text
        return member

    # What str and format give for a member differs between Python 3.10 and 3.12; here it is the short name in all.
    def __str__(self) -> str:
        return str(self._value_)

    def __format__(self, spec: str) -> str:
        return format(str(self._value_), spec)

    @classmethod
    def joined(cls, reasons: str | Iterable[str]) -> str:
        """The short name of one reason, or of several, sorted and joined by ``+``."""
        if isinstance(reasons, cls):
            return str(reasons)
        return reasons if isinstance(reasons, str) else "+".join(sorted(set(reasons)))

    @classmethod
    def explained(cls, name: str, details: Mapping[str, str] | None = None) -> str:
        """The sentences behind a short name, or behind several joined by ``+``; an unknown name stands for itself.

        Args:
            name: the short name.
            details: sentences that say more than the usual ones, by short name.
        """
        texts = {member._value_: member.text for member in cls} | {**(details or {})}
        return "; ".join(texts.get(part, part) for part in name.split("+"))


def decibel(error_energy: float, energy: float) -> float:
    """10 log10 of a ratio of energies; -inf for no error, NaN if one of them is NaN."""
    if math.isnan(error_energy) or math.isnan(energy):
        return math.nan
    if energy <= 0:
        return -math.inf if error_energy <= 0 else math.inf
    return 10 * math.log10(error_energy / energy) if error_energy > 0 else -math.inf


@dataclass
class SiteStats:
    """One call site. See :class:`Stats` for the meaning of bytes.

    Attributes:
        key, op, codec: the site key, the operation, and the codec applied last.
        calls, keyframes, forwarded: compressed calls other than receives, and how many of them carried keyframes only
            or passed a frame on. A broadcast counts on every rank, with 0 bytes on its receivers.
        predicted: calls that were answered with their prediction (``mode="predict-now"``).
        received: compressed messages that arrived in receives of this site.
        raw_bytes, wire_bytes: put on the link by this rank, passed-through calls of the site included.
        received_raw_bytes, received_wire_bytes: of the ``received`` messages.
        last_wire_bits_per_element: of the last residual frame sent; NaN before there was one.
        state_bytes: bytes held now: histories, the codecs' memory, and payloads kept to be passed on; without those in
            ``offloaded_bytes``.
        offloaded_bytes: bytes of histories and the codecs' memory that lie in host memory now (``state_offload``).
        parts: parts that the last compressed call's tensors travelled in; the most of them, where sites were folded.
        rate: number of the rate in use, or the lowest and the highest (``"3-5"``), where a target has it chosen.
        passed: number of passed-through calls by reason.
        evictions: how often the site lost its history to make room for another (``state_budget_bytes``).
        offloads: how often its state was taken to host memory to make room for another.
        error_energy, energy, sampled: sums of squares over the sampled calls, and the number of these calls.
        residual_energy, predicted_energy: sums of squares of the residuals, and of the tensors they belong to, over the
            sampled calls that carried residuals against a prediction.
    """

    key: str
    op: str
    codec: str = ""
    calls: int = 0
    keyframes: int = 0
    forwarded: int = 0
    predicted: int = 0
    received: int = 0
    raw_bytes: int = 0
    wire_bytes: int = 0
    received_raw_bytes: int = 0
    received_wire_bytes: int = 0
    last_wire_bits_per_element: float = math.nan
    state_bytes: int = 0
    offloaded_bytes: int = 0
    parts: int = 1
    rate: str = ""
    passed: Counter[str] = field(default_factory=Counter)
    evictions: int = 0
    offloads: int = 0
    error_energy: float = 0.0
    energy: float = 0.0
    sampled: int = 0
    residual_energy: float = 0.0
    predicted_energy: float = 0.0

    @property
    def residual_share(self) -> float:
        """Energy of the residuals over that of the tensors, of the sampled calls; NaN without any."""
        return self.residual_energy / self.predicted_energy if self.predicted_energy else math.nan

    @property
    def ratio(self) -> float:
        """Raw over wire bytes, keyframes and headers included."""
        return self.raw_bytes / self.wire_bytes if self.wire_bytes else 1.0

    @property
    def nmse_db(self) -> float:
        """Energy of the reconstruction error over that of the tensor, in dB, of the sampled calls; NaN without any."""
        return decibel(self.error_energy, self.energy) if self.sampled else math.nan

    @property
    def activity(self) -> int:
        """Number of all events counted here; it stands still while the site is not used."""
        return self.calls + self.received + self.sampled + sum(self.passed.values())

    def add(self, other: SiteStats) -> None:
        """Add the counts of ``other`` to these."""
        self.codec = other.codec or self.codec
        self.parts = max(self.parts, other.parts)
        for name in _SUMS:
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.passed += other.passed

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON, ``ratio`` and ``nmse_db`` included; ``None`` where there is no finite number."""
        values = {**asdict(self), "passed": dict(self.passed), "ratio": self.ratio, "nmse_db": self.nmse_db}
        return {name: _finite(value) for name, value in values.items()}


_SUMS = (
    "calls",
    "keyframes",
    "forwarded",
    "predicted",
    "received",
    "raw_bytes",
    "wire_bytes",
    "received_raw_bytes",
    "received_wire_bytes",
    "error_energy",
    "energy",
    "sampled",
    "residual_energy",
    "predicted_energy",
    "evictions",
    "offloads",
)


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


@dataclass(frozen=True)
class Stats:
    """Totals of one wrapped group on this rank.

    Attributes:
        raw_bytes: bytes the calls would have sent uncompressed, passed-through calls included.
        wire_bytes: bytes really sent, headers, scales, padding and passed-through calls included.
        compressed_calls: calls that went through a codec (keyframes included).
        forwarded: compressed calls that passed on a received tensor to the bit: in the frame it arrived in or, where a
            keyframe was expected, in a keyframe of their own; no encoder added an error.
        passed_through: calls that went to the inner group unchanged.
        passed_reasons: number of passed-through calls by reason.
        state_bytes: bytes held now: histories, the codecs' memory, and payloads kept to be passed on; without those in
            ``offloaded_bytes``.
        sites: per call site, in order of first use; then one record per operation for the sites that were folded.
        received_calls: receives that got a compressed message; not among ``compressed_calls``.
        received_raw_bytes, received_wire_bytes: bytes of those messages; not among ``raw_bytes`` and ``wire_bytes``.
        target: what ``target=`` asked for and what was met since the last reset (``asked``, ``met``, then ``nmse_db``,
            ``bits`` and ``bytes_per_step`` of residual frames, and ``request_bits`` of all frames); ``None`` without.
        predicted: compressed calls that were answered with their prediction (``mode="predict-now"``).
        evictions: how often a site lost its history to make room for another.
        offloaded_bytes: bytes of histories and the codecs' memory that lie in host memory now (``state_offload``).
        offloads: how often a site's state was taken to host memory to make room for another.
        late_reads: how often a call waited for what a GPU had measured, or seen announced, in an earlier one
            (``target=``, and codecs of several rates): the host was further ahead than a step.
        late_preparations: how often a codec that learns (``transform``) had to do so while a frame was made or decoded,
            as the group had waited for no message since the site's frame before.
    """

    raw_bytes: int
    wire_bytes: int
    compressed_calls: int
    forwarded: int
    passed_through: int
    passed_reasons: dict[str, int]
    state_bytes: int
    sites: dict[str, SiteStats]
    received_calls: int = 0
    received_raw_bytes: int = 0
    received_wire_bytes: int = 0
    target: dict[str, Any] | None = None
    predicted: int = 0
    evictions: int = 0
    offloaded_bytes: int = 0
    offloads: int = 0
    late_reads: int = 0
    late_preparations: int = 0

    @property
    def ratio(self) -> float:
        """Raw over wire bytes."""
        return self.raw_bytes / self.wire_bytes if self.wire_bytes else 1.0

    @property
    def hint(self) -> str | None:
        """What to look into where nothing was counted; ``None`` where something was."""
        if self.compressed_calls or self.received_calls or self.passed_through:
            return None
        return (
            "no collective reached this group; pass group=... (what wrap() returned) to torch.distributed's functions, "
            "or call its methods"
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON, ``ratio`` and ``hint`` included; ``None`` where there is no finite number."""
        values = {name: getattr(self, name) for name in self.__dataclass_fields__}
        values["passed_reasons"] = dict(self.passed_reasons)
        values["sites"] = {key: site.to_dict() for key, site in self.sites.items()}
        return {**values, "ratio": self.ratio, "hint": self.hint}


class GroupStats:
    """The counters of one group; safe to use from several threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._sites: dict[str, SiteStats] = {}
        self._evicted_early: Counter[str] = Counter()  # sites whose first call has not left yet
        self._folded: dict[str, SiteStats] = {}
        self._activity: dict[str, int] = {}
        self._passed: dict[tuple[str, str], list[float]] = {}
        self._small: dict[str, tuple[int, int]] = {}
        self._warned: set[str] = set()

    def _held(self, key: str, op: str) -> SiteStats:
        """The record of a site, made on first use. The lock is held."""
        found = self._sites.get(key)
        if found is None:
            found = self._sites[key] = SiteStats(key, op, evictions=self._evicted_early.pop(key, 0))
        return found

    def sent(
        self,
        key: str,
        op: str,
        codec: str,
        *,
        raw: int,
        wire: int,
        keyframe: bool,
        numel: int,
        forwarded: bool = False,
        predicted: bool = False,
        parts: int = 1,
        calls: int = 1,
    ) -> None:
        """Count a compressed call: ``raw`` and ``wire`` bytes on the link, ``numel`` elements in all messages.

        ``calls``: so many of them, each with these numbers.
        """
        with self._lock:
            site = self._sites.get(key) or self._held(key, op)
            site.codec = codec
            site.calls += calls
            site.parts = parts
            site.raw_bytes += calls * raw
            site.wire_bytes += calls * wire
            if keyframe:
                site.keyframes += calls
            elif numel:
                site.last_wire_bits_per_element = 8 * wire / numel
            if forwarded:
                site.forwarded += calls
            if predicted:
                site.predicted += calls

    def received(self, key: str, op: str, codec: str, *, raw: int, wire: int, calls: int = 1) -> None:
        """Count a compressed message that arrived in a receive.

        Args:
            key: the site key.
            op: operation of the site.
            codec: id of the message's codec.
            raw: bytes of the tensor.
            wire: bytes of the frame.
            calls: so many of them, each with these numbers.
        """
        with self._lock:
            site = self._held(key, op)
            site.codec = codec
            site.received += calls
            site.received_raw_bytes += calls * raw
            site.received_wire_bytes += calls * wire

    def error(self, key: str, op: str, error_energy: float, energy: float, residual_energy: float = math.nan) -> None:
        """Record a sampled reconstruction error; ``residual_energy`` is NaN where the frame carried no residual."""
        with self._lock:
            site = self._held(key, op)
            site.error_energy += error_energy
            site.energy += energy
            site.sampled += 1
            if not math.isnan(residual_energy):
                site.residual_energy += residual_energy
                site.predicted_energy += energy

    def small(self, op: str, numel: int) -> None:
        """Remember the size of a message that is below ``min_numel``."""
        with self._lock:
            least, most = self._small.get(op, (numel, numel))
            self._small[op] = min(least, numel), max(most, numel)

    def passed(
        self, op: str, reason: str | Iterable[str], nbytes: float, key: str | None = None, *, wire: float | None = None
    ) -> None:
        """Count one passed-through call.

        Args:
            op: operation.
            reason: a :class:`PassReason`, or the several reasons of a call's parts.
            nbytes: bytes of the uncompressed tensors on the link.
            key: the site key; ``None``: count the call under its operation only.
            wire: bytes really on the link, where the tensor travelled in a frame; ``None``: ``nbytes``.
        """
        name = PassReason.joined(reason)
        with self._lock:
            entry = self._passed.get((op, name))
            if entry is None:
                entry = self._passed[op, name] = [0, 0.0]
            entry[0] += 1
            if key is None:
                entry[1] += nbytes
            else:
                site = self._held(key, op)
                site.passed[name] += 1
                site.raw_bytes += int(nbytes)
                site.wire_bytes += int(nbytes if wire is None else wire)

    def evicted(self, key: str) -> None:
        """Count that a site lost its history to make room for another; its first call may still wait to leave."""
        with self._lock:
            site = self._sites.get(key)
            if site is None:
                self._evicted_early[key] += 1
            else:
                site.evictions += 1

    def offloaded(self, key: str) -> None:
        """Count that a site's state was taken to host memory to make room for another."""
        with self._lock:
            site = self._sites.get(key)
            if site is not None:
                site.offloads += 1

    def fold(self, prefix: str | None, where: str = "(reset prefixes)") -> None:
        """Merge records that ``reset(prefix)`` made idle, so that a server's many keys do not pile up.

        Totals stay as they are. Folded records appear as one record per operation.

        Args:
            prefix: merge the records of all sites under this prefix. ``None``, for a full reset: merge those of the
                sites that were not used since the full reset before; sites used in every request keep their records.
            where: begins the names of the merged records of a prefix.
        """
        with self._lock:
            if prefix is None:
                where = "(earlier requests)"
                idle = [key for key, site in self._sites.items() if self._activity.get(key) == site.activity]
            else:
                idle = [key for key in self._sites if key.startswith(prefix + "/")]
            for key in idle:
                site = self._sites.pop(key)
                name = f"{where}/{site.op}"
                self._folded.setdefault(name, SiteStats(name, site.op)).add(site)
            if prefix is None:
                self._activity = {key: site.activity for key, site in self._sites.items()}

    def first_time(self, what: str) -> bool:
        """True once per ``what``: for warnings that must not repeat."""
        with self._lock:
            if what in self._warned:
                return False
            self._warned.add(what)
            return True

    def snapshot(
        self,
        state_bytes_of: dict[str, int],
        rates: Mapping[str, str] | None = None,
        offloaded_bytes_of: Mapping[str, int] | None = None,
    ) -> Stats:
        """Totals now; the arguments map keys to bytes held, to rates in use, and to bytes held in host memory."""
        away = offloaded_bytes_of or {}
        with self._lock:
            for site in self._sites.values():
                site.state_bytes = state_bytes_of.get(site.key, 0)
                site.offloaded_bytes = away.get(site.key, 0)
                site.rate = (rates or {}).get(site.key, "")
            passed_bytes = int(sum(nbytes for _, nbytes in self._passed.values()))
            reasons: Counter[str] = Counter()
            for (_, reason), (count, _) in self._passed.items():
                reasons[reason] += int(count)
            live = {**self._sites, **self._folded}
            sites = {key: replace(site, passed=Counter(site.passed)) for key, site in live.items()}
            return Stats(
                raw_bytes=sum(s.raw_bytes for s in sites.values()) + passed_bytes,
                wire_bytes=sum(s.wire_bytes for s in sites.values()) + passed_bytes,
                compressed_calls=sum(s.calls for s in sites.values()),
                forwarded=sum(s.forwarded for s in sites.values()),
                passed_through=sum(reasons.values()),
                passed_reasons=dict(reasons),
                state_bytes=sum(state_bytes_of.values()),
                sites=sites,
                received_calls=sum(s.received for s in sites.values()),
                received_raw_bytes=sum(s.received_raw_bytes for s in sites.values()),
                received_wire_bytes=sum(s.received_wire_bytes for s in sites.values()),
                predicted=sum(s.predicted for s in sites.values()),
                evictions=sum(s.evictions for s in sites.values()),
                offloaded_bytes=sum(away.values()),
                offloads=sum(s.offloads for s in sites.values()),
            )

    def passed_table(self) -> dict[tuple[str, str], tuple[int, float]]:
        """(op, reason) -> (calls, bytes of calls without a site record)."""
        with self._lock:
            return {key: (int(count), nbytes) for key, (count, nbytes) in self._passed.items()}

    def small_sizes(self) -> dict[str, tuple[int, int]]:
        """Operation -> elements of the smallest and of the largest message that was below ``min_numel``."""
        with self._lock:
            return dict(self._small)

    def clear(self) -> None:
        """Start counting again."""
        with self._lock:
            self._small.clear()
            self._sites.clear()
            self._evicted_early.clear()
            self._folded.clear()
            self._activity.clear()
            self._passed.clear()
