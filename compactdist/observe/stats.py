"""What was really sent: counters per call site, totals, and the table of ``explain()``.

Bytes are those this rank puts on the link: an all-gather counts its input once per other rank, an all-to-all its chunks
for the others, a broadcast the root's tensor once per other rank, a send the message. Reductions count what the
bandwidth-optimal algorithm sends (nccl-tests' bus factors). Receives count nothing.
"""

from __future__ import annotations

import math
import threading
from collections import Counter
from dataclasses import dataclass, field

__all__ = ["GroupStats", "PassReason", "SiteStats", "Stats", "decibel"]


class PassReason:
    """Why a call was not compressed."""

    NO_STEP = "no-step"
    OP = "op"
    DTYPE = "dtype"
    SMALL = "small"
    POLICY = "policy"
    AUTOGRAD = "autograd"
    WORLD_SIZE = "world-size-1"
    BUDGET = "state-budget"
    UNEVEN = "uneven"
    DEVICE = "device"
    PEER = "peer-passed"


def decibel(error_energy: float, energy: float) -> float:
    """10 log10 of a ratio of energies; -inf for no error."""
    if energy <= 0:
        return -math.inf if error_energy <= 0 else math.inf
    return 10 * math.log10(error_energy / energy) if error_energy > 0 else -math.inf


@dataclass
class SiteStats:
    """One call site. See :class:`Stats` for the meaning of bytes."""

    key: str
    op: str
    codec: str = ""
    calls: int = 0
    keyframes: int = 0
    forwarded: int = 0
    raw_bytes: int = 0
    wire_bytes: int = 0
    last_wire_bits_per_element: float = math.nan
    state_bytes: int = 0
    passed: Counter[str] = field(default_factory=Counter)
    error_energy: float = 0.0
    energy: float = 0.0
    sampled: int = 0

    @property
    def ratio(self) -> float:
        """Raw over wire bytes, keyframes and headers included."""
        return self.raw_bytes / self.wire_bytes if self.wire_bytes else 1.0

    @property
    def nmse_db(self) -> float:
        """Energy of the reconstruction error over that of the tensor in dB, over the sampled calls; NaN if none was."""
        return decibel(self.error_energy, self.energy) if self.sampled else math.nan


@dataclass(frozen=True)
class Stats:
    """Totals of one wrapped group on this rank.

    Attributes:
        raw_bytes: bytes the calls would have sent uncompressed, passed-through calls included.
        wire_bytes: bytes really sent, headers, scales, padding and passed-through calls included.
        compressed_calls: calls that went through a codec (keyframes included).
        forwarded: those of them that passed on what was received, to the bit, in the frame it arrived in (or, where a
            keyframe was due, in one of its own); no encoder added an error.
        passed_through: calls that went to the inner group unchanged.
        passed_reasons: how often for which reason.
        state_bytes: bytes of history tensors held now, and of what encoders remember for themselves.
        sites: per call site, in order of first use.
    """

    raw_bytes: int
    wire_bytes: int
    compressed_calls: int
    forwarded: int
    passed_through: int
    passed_reasons: dict[str, int]
    state_bytes: int
    sites: dict[str, SiteStats]

    @property
    def ratio(self) -> float:
        """Raw over wire bytes."""
        return self.raw_bytes / self.wire_bytes if self.wire_bytes else 1.0


class GroupStats:
    """The counters of one group; safe to use from several threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._sites: dict[str, SiteStats] = {}
        self._passed: dict[tuple[str, str], list[float]] = {}
        self._warned: set[str] = set()

    def site(self, key: str, op: str) -> SiteStats:
        """The record of a site, made on first use."""
        found = self._sites.get(key)
        if found is None:
            with self._lock:
                found = self._sites.setdefault(key, SiteStats(key, op))
        return found

    def sent(
        self, key: str, op: str, codec: str, *, raw: int, wire: int, keyframe: bool, numel: int, forwarded: bool = False
    ) -> None:
        """Count one compressed call: ``raw`` and ``wire`` bytes on the link, ``numel`` elements in all messages."""
        site = self.site(key, op)
        with self._lock:
            site.codec = codec
            site.calls += 1
            site.keyframes += keyframe
            site.forwarded += forwarded
            site.raw_bytes += raw
            site.wire_bytes += wire
            if numel and not keyframe:
                site.last_wire_bits_per_element = 8 * wire / numel

    def error(self, key: str, op: str, error_energy: float, energy: float) -> None:
        """Record a sampled reconstruction error."""
        site = self.site(key, op)
        with self._lock:
            site.error_energy += error_energy
            site.energy += energy
            site.sampled += 1

    def passed(self, op: str, reason: str, nbytes: float, key: str | None = None, *, wire: float | None = None) -> None:
        """Count one passed-through call of ``nbytes`` bytes on the link (``wire`` where it travelled in a frame)."""
        with self._lock:
            entry = self._passed.get((op, reason))
            if entry is None:
                entry = self._passed[op, reason] = [0, 0.0]
            entry[0] += 1
            if key is None:
                entry[1] += nbytes
            else:
                site = self._sites.get(key)
                if site is None:
                    site = self._sites[key] = SiteStats(key, op)
                site.passed[reason] += 1
                site.raw_bytes += int(nbytes)
                site.wire_bytes += int(nbytes if wire is None else wire)

    def fold(self, prefix: str) -> None:
        """Merge the records of sites under a finished prefix, so that a server's many prefixes do not pile up."""
        with self._lock:
            for key in [k for k in self._sites if k.startswith(prefix + "/")]:
                site = self._sites.pop(key)
                name = f"(reset prefixes)/{site.op}"
                total = self._sites.setdefault(name, SiteStats(name, site.op))
                total.codec = site.codec or total.codec
                total.calls += site.calls
                total.keyframes += site.keyframes
                total.forwarded += site.forwarded
                total.raw_bytes += site.raw_bytes
                total.wire_bytes += site.wire_bytes
                total.passed += site.passed
                total.error_energy += site.error_energy
                total.energy += site.energy
                total.sampled += site.sampled

    def first_time(self, what: str) -> bool:
        """True once per ``what``: for warnings that must not repeat."""
        with self._lock:
            if what in self._warned:
                return False
            self._warned.add(what)
            return True

    def snapshot(self, state_bytes_of: dict[str, int]) -> Stats:
        """Totals now; ``state_bytes_of`` maps keys to bytes held."""
        with self._lock:
            for site in self._sites.values():
                site.state_bytes = state_bytes_of.get(site.key, 0)
            passed_bytes = int(sum(nbytes for _, nbytes in self._passed.values()))
            reasons: Counter[str] = Counter()
            for (_, reason), (count, _) in self._passed.items():
                reasons[reason] += int(count)
            return Stats(
                raw_bytes=sum(s.raw_bytes for s in self._sites.values()) + passed_bytes,
                wire_bytes=sum(s.wire_bytes for s in self._sites.values()) + passed_bytes,
                compressed_calls=sum(s.calls for s in self._sites.values()),
                forwarded=sum(s.forwarded for s in self._sites.values()),
                passed_through=sum(reasons.values()),
                passed_reasons=dict(reasons),
                state_bytes=sum(state_bytes_of.values()),
                sites=dict(self._sites),
            )

    def passed_table(self) -> dict[tuple[str, str], tuple[int, float]]:
        """(op, reason) -> (calls, bytes of calls without a site record)."""
        with self._lock:
            return {key: (int(count), nbytes) for key, (count, nbytes) in self._passed.items()}

    def clear(self) -> None:
        """Start counting again."""
        with self._lock:
            self._sites.clear()
            self._passed.clear()
