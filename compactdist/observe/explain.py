"""The table of ``CompressedProcessGroup.explain()``."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from compactdist.observe.stats import PassReason, Stats

if TYPE_CHECKING:
    from compactdist.group.lifecycle import GroupLifecycle

__all__ = ["explain"]

_HEAD = (
    "site",
    "codec",
    "calls",
    "key",
    "raw B",
    "wire B",
    "ratio",
    "bits",
    "NMSE dB",
    "state B",
    "fwd",
    "recv",
    "passed",
)


def _number(value: float, digits: int = 2) -> str:
    return "-" if math.isnan(value) else f"{value:.{digits}f}"


def _table(rows: list[tuple[str, ...]]) -> list[str]:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [row[0].ljust(widths[0])] + [c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True)]
        lines.append("  ".join(cells).rstrip())
    return lines


def _site_rows(stats: Stats) -> list[tuple[str, ...]]:
    rows: list[tuple[str, ...]] = [_HEAD]
    for site in stats.sites.values():
        rows.append(
            (
                site.key,
                site.codec or "-",
                str(site.calls),
                str(site.keyframes),
                str(site.raw_bytes),
                str(site.wire_bytes),
                _number(site.ratio),
                _number(site.last_wire_bits_per_element),
                _number(site.nmse_db, 1),
                str(site.state_bytes),
                str(site.forwarded),
                str(site.received),
                ", ".join(f"{count} x {reason}" for reason, count in site.passed.items()) or "-",
            )
        )
    return rows


def _totals(stats: Stats, budget: int | None) -> str:
    received = ""
    if stats.received_calls:
        received = (
            f"{stats.received_calls} calls only received, {stats.received_raw_bytes} raw bytes as "
            f"{stats.received_wire_bytes} wire bytes, "
        )
    return (
        f"total: {stats.compressed_calls} compressed and {stats.passed_through} passed-through calls, "
        f"{stats.raw_bytes} raw bytes as {stats.wire_bytes} wire bytes (ratio {stats.ratio:.2f}), "
        f"{received}{stats.state_bytes} bytes of state" + (f" of at most {budget}" if budget is not None else "")
    )


def explain(group: GroupLifecycle) -> str:
    """Per call site: calls, codec, bytes, ratio, error; then why calls passed through; then totals.

    ``fwd`` counts calls that passed on a received tensor, ``recv`` compressed messages that arrived in receives (their
    bytes are in the line of totals). Bits are wire bits per element of the last residual call, header and scales
    included; the ratio is over all calls, keyframes included; NMSE is over the sampled calls
    (``sample_errors_every``), ``-`` without any.
    """
    stats = group.stats()
    engine, keys = group._engine, group._keys
    lines = [
        f"{group!r}: {'no' if keys.step < 0 else keys.step + 1} steps since reset, epoch {keys.epoch}",
    ]
    if stats.sites:
        lines += _table(_site_rows(stats))
    if stats.passed_reasons:
        lines.append("passed through:")
        reasons: dict[tuple[str, str], int] = {k: count for k, (count, _) in engine.stats.passed_table().items()}
        for (op, reason), count in sorted(reasons.items()):
            lines.append(f"  {count} x {op}: {reason} ({PassReason.explained(reason)})")
    lines.append(_totals(stats, engine.store.budget_bytes))
    return "\n".join(lines)
