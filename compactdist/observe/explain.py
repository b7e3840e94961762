"""The table of ``CompressedProcessGroup.explain()``."""

from __future__ import annotations

import fnmatch
import math
import shutil
import textwrap
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from compactdist.observe.stats import PassReason, SiteStats, Stats
from compactdist.policy import Rules

if TYPE_CHECKING:
    from compactdist.group.lifecycle import GroupLifecycle

__all__ = ["explain"]

_NARROWEST = 40
_UNITS = ("B", "kB", "MB", "GB", "TB")
_LARGE_RESIDUAL = 0.5
_Lines = list[str]
_Column = tuple[str, str, Callable[[SiteStats], str]]


def _number(value: float, digits: int = 2) -> str:
    return "-" if math.isnan(value) else f"{value:.{digits}f}"


def _unit(sites: Sequence[SiteStats], of: Callable[[SiteStats], int]) -> tuple[str, Callable[[SiteStats], str]]:
    """The unit for a column of bytes, in which its largest number is below 1000, and the column's cells."""
    power = min((len(str(max(map(of, sites)))) - 1) // 3, len(_UNITS) - 1)
    return _UNITS[power], lambda site: f"{of(site) / 1000**power:.{2 if power else 0}f}"


def _columns(sites: Sequence[SiteStats]) -> list[_Column]:
    """Two lines of head, and the cell of a site, for each column that says something of some site."""
    raw, raw_cell = _unit(sites, lambda site: site.raw_bytes)
    wire, wire_cell = _unit(sites, lambda site: site.wire_bytes)
    state, state_cell = _unit(sites, lambda site: site.state_bytes)
    columns: list[_Column] = [
        ("", "codec", lambda site: site.codec or "-"),
        ("", "calls", lambda site: str(site.calls)),
        ("key-", "fr.", lambda site: str(site.keyframes)),
        ("raw", raw, raw_cell),
        ("wire", wire, wire_cell),
        ("", "ratio", lambda site: _number(site.ratio)),
        ("", "bits", lambda site: _number(site.last_wire_bits_per_element)),
        ("state", state, state_cell),
    ]
    if any(site.offloads for site in sites):
        away, away_cell = _unit(sites, lambda site: site.offloaded_bytes)
        columns.append(("host", away, away_cell))
    if any(site.parts > 1 for site in sites):
        columns.append(("", "parts", lambda site: str(site.parts)))
    if any(site.rate for site in sites):
        columns.append(("", "rate", lambda site: site.rate or "-"))
    if any(site.sampled for site in sites):
        columns.append(("NMSE", "dB", lambda site: _number(site.nmse_db, 1)))
    if any(site.forwarded for site in sites):
        columns.append(("", "fwd", lambda site: str(site.forwarded)))
    if any(site.predicted for site in sites):
        columns.append(("", "pred", lambda site: str(site.predicted)))
    if any(site.received for site in sites):
        columns.append(("", "recv", lambda site: str(site.received)))
    return columns


def _table(sites: Sequence[SiteStats], width: int) -> _Lines:
    """A line for each site; where that would be too wide, the site's key on a line of its own before its numbers."""
    columns = _columns(sites)
    rows = [[cell(site) for _, _, cell in columns] for site in sites]
    heads = [[first for first, _, _ in columns], [second for _, second, _ in columns]]
    widths = [max(map(len, cells)) for cells in zip(*heads, *rows, strict=True)]
    keys = max(len("site"), *(len(site.key) for site in sites))
    gap = "  " if 2 + sum(widths) + 2 * (len(widths) - 1) <= width else " "
    joined = [gap.join(cell.rjust(w) for cell, w in zip(row, widths, strict=True)) for row in (*heads, *rows)]
    beside = keys + 2 + len(joined[0]) <= width
    start = " " * (keys + 2 if beside else 2)
    lines = [(start + joined[0]).rstrip(), "site".ljust(len(start)) + joined[1]] if beside else []
    if not beside:
        lines = ["site", (start + joined[0]).rstrip(), start + joined[1]]
    for site, numbers in zip(sites, joined[2:], strict=True):
        lines += [site.key.ljust(len(start)) + numbers] if beside else [*_wrapped(site.key, width), start + numbers]
        if site.passed:
            passed = ", ".join(f"{count} x {reason}" for reason, count in site.passed.items())
            lines += _wrapped(f"  passed: {passed}", width)
        if site.evictions:
            lines += _wrapped(f"  evicted: {site.evictions} x to make room for other sites", width)
        if site.offloads:
            lines += _wrapped(f"  offloaded: {site.offloads} x to make room for other sites", width)
    return lines


def _wrapped(text: str, width: int) -> _Lines:
    """The lines of a text, the later ones indented beyond the first."""
    indent = " " * (len(text) - len(text.lstrip()) + 2)
    return textwrap.wrap(text, width, subsequent_indent=indent, break_on_hyphens=False)


def _totals(stats: Stats, budget: int | None, offloads: bool) -> str:
    received = ""
    if stats.received_calls:
        received = (
            f"{stats.received_calls} calls only received, {stats.received_raw_bytes} raw bytes as "
            f"{stats.received_wire_bytes} wire bytes, "
        )
    return (
        f"total: {stats.compressed_calls} compressed and {stats.passed_through} passed-through calls, "
        f"{stats.raw_bytes} raw bytes as {stats.wire_bytes} wire bytes (ratio {stats.ratio:.2f}), "
        f"{received}{stats.state_bytes} bytes of state"
        + (f" of {'' if offloads else 'at most '}{budget}" if budget is not None else "")
        + (" that may stay on the device" if offloads else "")
        + (f", {stats.evictions} evictions" if stats.evictions else "")
        + (f", {stats.offloaded_bytes} bytes in host memory, {stats.offloads} offloads" if stats.offloads else "")
        + (f", {stats.late_reads} late reads of what a GPU had measured" if stats.late_reads else "")
        + (f", {stats.late_preparations} late preparations" if stats.late_preparations else "")
    )


def _asked(target: dict[str, Any]) -> str:
    """What was asked of rates, and what came of it."""

    def number(name: str) -> str:
        return "-" if target[name] is None else f"{target[name]:.4g}"

    return (
        f"target {target['asked']}: met {number('met')} (residual frames: {number('nmse_db')} dB, "
        f"{number('bits')} bits, {number('bytes_per_step')} bytes a step; all frames: {number('request_bits')} bits)"
    )


def _passed(group: GroupLifecycle) -> _Lines:
    """A line for each operation and reason."""
    engine = group._engine
    sizes, least = engine.stats.small_sizes(), engine.chooser.min_numel
    lines = []
    for (op, reason), (count, _) in sorted(engine.stats.passed_table().items()):
        details = {}
        sent_as = "send" if op == "recv" else op  # both ends of a message know it by one operation
        if sent_as in sizes:
            numel = " to ".join(map(str, dict.fromkeys(sizes[sent_as])))
            details[str(PassReason.SMALL)] = f"{numel} elements" + (f", and min_numel is {least}" if least else "")
        lines.append(f"  {count} x {op}: {reason} ({PassReason.explained(reason, details)})")
    return lines


def _large_residuals(sites: Sequence[SiteStats]) -> _Lines:
    """A line for each site whose history hardly predicts its tensors, as far as calls were sampled."""
    lines = [f"  {s.key}: {s.residual_share:.2f} of its energy" for s in sites if s.residual_share > _LARGE_RESIDUAL]
    head = "residuals as large as the tensor, so the history saves nothing there:"
    return [head, *lines] if lines else []


def _waited(group: GroupLifecycle, sites: Sequence[SiteStats]) -> _Lines:
    """What did not predict in a group that should: only all-gathers can."""
    others = sorted({site.op for site in sites if site.calls and site.op != "all_gather"})
    if group._engine.chooser.mode != "predict-now" or not others:
        return []
    return [f"mode='predict-now' is for all_gather; these waited for what arrived: {', '.join(others)}"]


def _unmet(group: GroupLifecycle, sites: Sequence[SiteStats]) -> _Lines:
    """Rules and layout hints that have no effect: of keys that no call site has, and rules that decided no call.

    Nothing is said once records were merged, or receives passed through, of which no record holds the key.
    """
    keys = [site.key for site in sites]
    hidden = any(key.startswith("(") for key in keys) or any(
        op == "recv" for op, _ in group._engine.stats.passed_table()
    )
    if not keys or hidden:
        return []
    options = group.options
    policy = options.policy_function if isinstance(options.policy_function, Rules) else Rules()
    rules = policy.rules
    globs = [("a rule of the policy", rule.key) for rule in rules]
    globs += [("a layout hint", glob) for glob in options.layouts or ()] if isinstance(options.layouts, Mapping) else []
    unmet = {glob for _, glob in globs if not any(fnmatch.fnmatchcase(key, glob) for key in keys)}
    lines = [
        f"{what} is for key={glob!r}, which no call site counted here has; with dist.key('...') names them"
        for what, glob in dict.fromkeys(globs)
        if glob in unmet
    ]
    lines += [
        f"rule {number + 1} of the policy, for key={rule.key!r}, decided no call so far: its other conditions fit "
        "none, or a rule before it decided them"
        for number, rule in enumerate(rules)
        if number not in policy.decided and rule.key not in unmet and rule.first_step <= group._keys.step
    ]
    return lines


def explain(group: GroupLifecycle, *, wait: bool = True) -> str:
    """Per call site: calls, codec, bytes, ratio, error; then why calls passed through; then totals.

    Lines are no longer than the terminal is wide, or 80 characters where there is none. ``fwd`` counts calls that
    passed on a received tensor, ``pred`` those answered with their prediction, ``recv`` compressed messages that
    arrived in receives (their bytes are in the line of totals); ``parts`` says in how many parts the tensors of the
    last call travelled; a column that would be empty is left out. Bits are wire bits per element of the last residual
    call, header and scales included; the ratio is over all calls, keyframes included; NMSE is over the sampled calls
    (``sample_errors_every``).
    """
    stats = group.stats(wait=wait)
    engine, keys = group._engine, group._keys
    width = max(_NARROWEST, shutil.get_terminal_size().columns)
    steps = "no" if keys.step < 0 else keys.step + 1
    texts = [f"{group!r}: {steps} steps since reset, epoch {keys.epoch}"]
    sites = list(stats.sites.values())
    lines = _wrapped(texts[0], width)
    if sites:
        lines += _table(sites, width)
    texts = [*_large_residuals(sites), *_waited(group, sites), *_unmet(group, sites)]
    if stats.passed_reasons:
        texts += ["passed through:", *_passed(group)]
    if stats.target is not None:
        texts.append(_asked(stats.target))
    texts.append(_totals(stats, engine.store.budget_bytes, engine.store.offload is not None))
    if stats.hint is not None:
        texts.append(stats.hint)
    return "\n".join(lines + [line for text in texts for line in _wrapped(text, width)])
