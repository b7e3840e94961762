"""The table of ``CompressedProcessGroup.explain()``."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from compactdist.group.lifecycle import GroupLifecycle

__all__ = ["explain"]

_REASONS = {
    "no-step": "no step, key or attached module had been seen yet",
    "op": "this operation is not compressed",
    "dtype": "not float32, float16 or bfloat16",
    "small": "fewer elements than min_numel",
    "policy": "the policy said so",
    "autograd": "the tensor requires grad, or the call came from a backward pass",
    "world-size-1": "the group has one rank",
    "state-budget": "state_budget_bytes of this rank or a peer is used up",
    "uneven": "chunks of unequal sizes",
    "device": "not possible on this device",
    "peer-passed": "the sender let it pass through",
}


def _number(value: float, digits: int = 2) -> str:
    return "-" if math.isnan(value) else f"{value:.{digits}f}"


def _table(rows: list[tuple[str, ...]]) -> list[str]:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [row[0].ljust(widths[0])] + [c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True)]
        lines.append("  ".join(cells).rstrip())
    return lines


def explain(group: GroupLifecycle) -> str:
    """Per call site: calls, codec, bytes, ratio, error; then why calls passed through; then totals.

    ``fwd`` counts calls that passed on what they had received. Bits are wire bits per element of the last compressed
    call, header and scales included; the ratio is over all calls, keyframes included; NMSE is of the sampled calls
    (``sample_errors_every``; what is passed on is not sampled), ``-`` if none was.
    """
    stats = group.stats()
    engine, keys = group._engine, group._keys
    lines = [
        f"{group!r}: {'no' if keys.step < 0 else keys.step + 1} steps since reset, epoch {keys.epoch}",
    ]
    if stats.sites:
        head = (
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
            "passed",
        )
        rows: list[tuple[str, ...]] = [head]
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
                    ", ".join(f"{count} x {reason}" for reason, count in site.passed.items()) or "-",
                )
            )
        lines += _table(rows)
    if stats.passed_reasons:
        lines.append("passed through:")
        reasons: dict[tuple[str, str], int] = {k: count for k, (count, _) in engine.stats.passed_table().items()}
        for (op, reason), count in sorted(reasons.items()):
            lines.append(f"  {count} x {op}: {reason} ({_REASONS.get(reason, reason)})")
    budget = engine.store.budget_bytes
    lines.append(
        f"total: {stats.compressed_calls} compressed and {stats.passed_through} passed-through calls, "
        f"{stats.raw_bytes} raw bytes as {stats.wire_bytes} wire bytes (ratio {stats.ratio:.2f}), "
        f"{stats.state_bytes} bytes of state" + (f" of at most {budget}" if budget is not None else "")
    )
    return "\n".join(lines)
