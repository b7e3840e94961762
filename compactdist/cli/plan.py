"""``compactdist plan``: which preset or codec is the fastest for a model's messages on a link, and whether any is.

Bytes and memory are those of ``dist.estimate``; with a trace, errors are measured on it. Encoding and
decoding are measured on this machine. Everything else is arithmetic, for each rank::

    link(bytes) = bytes / speed                     # no latency, each direction by itself
    codec       = sites * (encoders * encode + max(1, decoders) * decode)
    step        = compute + link(residual bytes) + codec
    request     = keyframe steps * (compute + link(keyframe bytes) + codec of keyframes) + other steps * step
    uncompressed request = steps * (compute + link(raw bytes))
    pays below  = (raw bytes - sent bytes of the request) / its time in codecs

Nothing overlaps in it. In a run the link works while a rank computes or decodes, with and without compression, and each
call takes some 0.1 ms of host time beside. A sender that decodes nothing (``send``, ``broadcast``) waits for its
receiver to decode.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape
from torch import Tensor

from compactdist.cli.bench_codecs import DTYPES, parse_shape
from compactdist.cli.common import Column, fitting_table
from compactdist.cli.evaluate import Setting, play_settings, recorded
from compactdist.cli.links import LINKS, link_of
from compactdist.cli.plan_times import time_messages
from compactdist.cli.streams_check import changing
from compactdist.config import Options
from compactdist.errors import ConfigError
from compactdist.exchange.ops import patterns_by_op
from compactdist.kernels.spec import MatrixView
from compactdist.observe.estimate import estimate
from compactdist.observe.trace import Trace
from compactdist.presets import expand, refuse_as_codec
from compactdist.state import plain

__all__ = [
    "LINKS",
    "Case",
    "Messages",
    "Row",
    "as_json",
    "candidates",
    "device_of",
    "link_of",
    "of_numbers",
    "of_trace",
    "plan",
    "recommend",
    "show",
]

_TENSORS = 4
_WORTH = 0.05
"""Of a request's time: what is gained or lost with less is not worth an error."""


@dataclass(frozen=True)
class Messages:
    """Equal messages of a step.

    Attributes:
        groups, rows, channels: matrix view of each.
        dtype: of each.
        sites: call sites that send one.
        tensors: flat, what is coded for the time.
    """

    groups: int
    rows: int
    channels: int
    dtype: torch.dtype
    sites: int
    tensors: Sequence[Tensor] = field(repr=False)

    @property
    def numel(self) -> int:
        """Elements of a message."""
        return self.groups * self.rows * self.channels

    @property
    def hint(self) -> MatrixView:
        """The matrix view, as a layout hint gives it."""
        return replace(plain(self.numel, self.groups, self.channels), hint=True)


@dataclass(frozen=True)
class Case:
    """What is to be planned for.

    Attributes:
        messages: of a step.
        op: the collective.
        ranks: of the group.
        steps: of a request.
        link: its name.
        gbps: its speed in Gbit/s.
        compute_s: of a step, without communication.
        trace: what errors are measured on; ``None``: there are none.
        played: how many of its steps are played; ``None``: all.
    """

    messages: Sequence[Messages]
    op: str
    ranks: int
    steps: int
    link: str
    gbps: float
    compute_s: float = 0.0
    trace: Trace | None = None
    played: int | None = None

    def link_s(self, nbytes: float) -> float:
        """Seconds of so many bytes on the link."""
        return 8e-9 * nbytes / self.gbps


@dataclass(frozen=True)
class Row:
    """A choice, or no compression.

    Attributes:
        name: preset or codec; ``"uncompressed"``.
        how: what to write in a program; empty for no compression.
        raw_bytes, keyframe_bytes, residual_bytes: a step, of one rank.
        request_bytes: of all steps of one rank.
        link_s: of a step of residuals on the link.
        codec_s, keyframe_codec_s: encoding and decoding of a step of residuals, of keyframes.
        step_s, request_s: estimated time.
        state_bytes: histories and codecs' memory of one rank.
        pays_below_gbps: link speed from which downwards a request is faster than uncompressed; ``None``: on no link;
            infinite where the codec takes no time.
        nmse_db: of residuals, on the trace; ``None`` without one.
    """

    name: str
    how: str
    raw_bytes: int
    keyframe_bytes: int
    residual_bytes: int
    request_bytes: int
    link_s: float
    codec_s: float
    keyframe_codec_s: float
    step_s: float
    request_s: float
    state_bytes: int
    pays_below_gbps: float | None = None
    nmse_db: float | None = None

    @property
    def ratio(self) -> float:
        """Raw over sent bytes of a residual step."""
        return self.raw_bytes / self.residual_bytes


# --- what is planned for


def device_of(name: str) -> torch.device:
    """The device of this name.

    Raises:
        ConfigError: it is neither ``cpu`` nor ``cuda``, or there is no GPU.
    """
    if name not in ("cpu", "cuda"):
        raise ConfigError(f"--device is cpu or cuda, got {name!r}")
    if name == "cuda" and not torch.cuda.is_available():
        raise ConfigError("--device cuda needs a GPU, and torch finds none here: compactdist doctor says what it sees")
    return torch.device(name)


def of_numbers(shape: str, dtype: str, sites: int, device: torch.device) -> list[Messages]:
    """Messages of one shape ``NxC``; their tensors change by a tenth from one to the next.

    Raises:
        ConfigError: this is no shape, or no dtype.
    """
    rows, channels = parse_shape(shape)
    if dtype not in DTYPES:
        raise ConfigError(f"--dtype {dtype!r} is none of {', '.join(DTYPES)}")
    tensors = [x.reshape(-1).to(device) for x in changing(_TENSORS, rows, channels, DTYPES[dtype])]
    return [Messages(1, rows, channels, DTYPES[dtype], sites, tensors)]


def of_trace(trace: Trace, steps: int | None, device: torch.device) -> tuple[list[Messages], int]:
    """Messages of a trace, those of one shape together, and how many steps a request of it has.

    Args:
        trace: the trace.
        steps: how many of the recorded steps to play, evenly spaced; ``None``: all.
        device: where the time of messages is measured.

    Raises:
        TraceError: a tensor cannot be played, or has fewer steps.
    """
    found: dict[tuple[Any, ...], list[Any]] = {}
    played = 0
    for entry in recorded(trace, steps, keyframes=1):
        count, rows, channels = entry.x.shape
        played = max(played, count)
        kind = (entry.groups, rows // entry.groups, channels, entry.x.dtype)
        tensors = [x.reshape(-1).to(device) for x in entry.x[:_TENSORS]]
        found.setdefault(kind, [0, tensors])[0] += 1
    return [
        Messages(groups, rows, channels, dtype, count, tensors)
        for (groups, rows, channels, dtype), (count, tensors) in found.items()
    ], played


def candidates(presets: Sequence[str], codecs: Sequence[str]) -> dict[str, tuple[Options, str]]:
    """Options, and how to ask for them, by the name of their row.

    Raises:
        CompactDistError: there is no such preset or codec.
    """
    for name in codecs:
        refuse_as_codec(name, "leave it out, as every preset has a row")
    made = {name: (expand({"preset": name}), f"wrap(preset={name!r})") for name in presets}
    made |= {name: ({"codec": name}, f"wrap(codec={name!r})") for name in dict.fromkeys(codecs)}
    return {name: (Options(**settings, find_layout=False), how) for name, (settings, how) in made.items()}


# --- the rows


def plan(case: Case, chosen: Mapping[str, tuple[Options, str]]) -> list[Row]:
    """A row without compression, then one for each choice.

    Raises:
        ConfigError: an unknown op, or a number below 1.
        TraceError: the trace cannot be played.
    """
    if case.op not in patterns_by_op():
        raise ConfigError(f"--op is one of {', '.join(patterns_by_op())}, got {case.op!r}")
    settings = {name: Setting(options.default_codec, options.stream) for name, (options, _) in chosen.items()}
    errors: dict[str, float | None] = dict.fromkeys(chosen)
    if case.trace is not None:
        scores = play_settings(case.trace, settings, case.played)
        errors = {name: score.residuals.nmse_db for name, score in scores.items()}
    rows = [_row(case, name, options, how, settings[name], errors[name]) for name, (options, how) in chosen.items()]
    return [_uncompressed(case), *rows]


def _links(case: Case) -> tuple[int, int, int]:
    """Messages on the link, encoders and decoders of one call on one rank."""
    return patterns_by_op()[case.op].histories(case.ranks)


def _raw_bytes(case: Case, messages: Sequence[Messages]) -> int:
    return sum(_links(case)[0] * each.sites * each.numel * each.dtype.itemsize for each in messages)


def _uncompressed(case: Case) -> Row:
    raw = _raw_bytes(case, case.messages)
    link = case.link_s(raw)
    step = case.compute_s + link
    return Row("uncompressed", "", raw, raw, raw, case.steps * raw, link, 0, 0, step, case.steps * step, 0)


def _row(case: Case, name: str, options: Options, how: str, setting: Setting, nmse_db: float | None) -> Row:
    _, encoders, decoders = _links(case)
    passed = [each for each in case.messages if each.numel < options.min_numel]
    raw = keyframe = residual = _raw_bytes(case, passed)
    state, codec, keyframe_codec = 0, 0.0, 0.0
    for each in case.messages:
        if each.numel < options.min_numel:
            continue
        known: dict[str, Any] = {"op": case.op, "dtype": each.dtype, "sites": each.sites}
        told = estimate(options, case.ranks, each.numel, channels=each.channels, groups=each.groups, **known)
        times = time_messages(setting, each.tensors, each.hint)
        raw, keyframe = raw + told.raw_bytes, keyframe + told.keyframe_bytes
        residual += told.wire_bytes
        state += told.state_bytes
        receivers = max(1, decoders)
        codec += each.sites * (encoders * times.encode + receivers * times.decode)
        keyframe_codec += each.sites * (encoders * times.keyframe_encode + receivers * times.keyframe_decode)
    first = min(case.steps, max(1, options.stream.warmup_steps))  # steps of keyframes
    later = case.steps - first
    sent, coding = first * keyframe + later * residual, first * keyframe_codec + later * codec
    saved = case.steps * raw - sent
    below = None if saved <= 0 else 8e-9 * saved / coding if coding else math.inf
    link = case.link_s(residual)
    request = case.steps * case.compute_s + case.link_s(sent) + coding
    step = case.compute_s + link + codec
    return Row(
        name, how, raw, keyframe, residual, sent, link, codec, keyframe_codec, step, request, state, below, nmse_db
    )  # fmt: skip


# --- which one


def recommend(rows: Sequence[Row], limit_db: float | None = None) -> tuple[str | None, str]:
    """The name of the row to take, ``None`` for no compression, and why.

    The fastest; of those that are at most a twentieth slower, the one with the least error or, where errors are
    unknown, the one that sends the most bytes.

    Args:
        rows: without compression, then the choices.
        limit_db: an error that the choice may have at most.
    """
    plain_row, *choices = rows
    fit = [row for row in choices if limit_db is None or (row.nmse_db is not None and row.nmse_db <= limit_db)]
    if not fit:
        return None, f"No choice has an error of {limit_db:g} dB or less: send uncompressed, or try --codec int8."
    fastest = min(fit, key=lambda row: row.request_s)
    if fastest.request_s > (1 - _WORTH) * plain_row.request_s:
        below = max((row.pays_below_gbps or 0.0 for row in fit), default=0.0)
        when = f" One would begin to save time below {below:.3g} Gbit/s." if 0 < below < math.inf else ""
        return None, (
            f"No compression pays on this link: a request takes {_seconds(plain_row.request_s)} uncompressed, and "
            f"{_seconds(fastest.request_s)} with {fastest.name}, the fastest.{when}"
        )
    near = [row for row in fit if row.request_s <= (1 + _WORTH) * fastest.request_s]
    best = min(near, key=_wrongness)
    error = "its error is unknown without a trace" if best.nmse_db is None else f"its error is {best.nmse_db:.1f} dB"
    among = "" if limit_db is None else f" of those with {limit_db:g} dB or less"
    why = f"the fastest{among}" if best is fastest else f"nearly as fast as {fastest.name}, with the least error"
    return best.name, (
        f"Take {best.name}, {best.how}: {why}. A request takes {_seconds(best.request_s)} instead of "
        f"{_seconds(plain_row.request_s)} ({plain_row.request_s / best.request_s:.2g} times as fast); {error}."
    )


def _wrongness(row: Row) -> float:
    return -float(row.request_bytes) if row.nmse_db is None else row.nmse_db


def _seconds(seconds: float) -> str:
    return f"{seconds:.3g} s" if seconds >= 1 else f"{1e3 * seconds:.3g} ms"


# --- output


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def as_json(case: Case, rows: Sequence[Row], advice: tuple[str | None, str], load: float) -> dict[str, Any]:
    """Plain values; ``nmse_db`` is ``None`` where the choice is exact, too."""
    return {
        "command": " ".join(["compactdist", *sys.argv[1:]]),
        "messages": [
            {"groups": m.groups, "rows": m.rows, "channels": m.channels, "dtype": _dtype(m), "sites": m.sites}
            for m in case.messages
        ],
        "op": case.op,
        "ranks": case.ranks,
        "steps": case.steps,
        "gbps": case.gbps,
        "compute_ms": 1e3 * case.compute_s,
        "load_average_before": round(load, 2),
        "threads": torch.get_num_threads(),
        "device": str(case.messages[0].tensors[0].device),
        "trace": None if case.trace is None else str(case.trace.path),
        "measured": ["codec_s", "keyframe_codec_s"] + (["nmse_db"] if case.trace is not None else []),
        "rows": [{name: _finite(value) for name, value in asdict(row).items()} for row in rows],
        "recommended": advice[0],
        "why": advice[1],
    }


def _dtype(messages: Messages) -> str:
    return str(messages.dtype).removeprefix("torch.")


def _columns(rows: Sequence[Row]) -> list[Column]:
    slowest, largest = max(row.request_s for row in rows), max(row.request_bytes for row in rows)
    per, unit = (1.0, "s") if slowest >= 10 else (1e3, "ms")
    size, called = (1e-6, "MB") if largest >= 1e6 else (1e-3, "kB")
    return [
        Column("", lambda row: escape(row.name), left=True),
        Column(f"key\n{called}", lambda row: _number(row.keyframe_bytes * size), spare=2),
        Column(f"step\n{called}", lambda row: _number(row.residual_bytes * size)),
        Column(f"request\n{called}", lambda row: _number(row.request_bytes * size)),
        Column("\nratio", lambda row: f"{row.ratio:.1f}"),
        Column("link\nms", lambda row: _number(1e3 * row.link_s)),
        Column("codec\nms", lambda row: _number(1e3 * row.codec_s) if row.codec_s else "-"),
        Column("step\nms", lambda row: _number(1e3 * row.step_s), spare=1),
        Column(f"request\n{unit}", lambda row: _number(row.request_s * per)),
        Column("times\nfaster", lambda row: _number(rows[0].request_s / row.request_s)),
        Column("pays below\nGbit/s", _below, spare=1),
        Column("state\nMB", lambda row: _number(row.state_bytes / 1e6) if row.state_bytes else "-", spare=2),
        Column("NMSE\ndB", _error),
    ]


def _number(value: float) -> str:
    """Three digits, and no fewer than there are before the point."""
    return f"{value:.0f}" if value >= 1000 else f"{value:.3g}"


def _below(row: Row) -> str:
    if not row.how:
        return "-"
    return "never" if row.pays_below_gbps is None else _number(row.pays_below_gbps)


def _error(row: Row) -> str:
    if not row.how:
        return "exact"
    if row.nmse_db is None:
        return "no trace"
    return f"{row.nmse_db:.1f}" if math.isfinite(row.nmse_db) else "exact"


def show(case: Case, rows: Sequence[Row], advice: tuple[str | None, str], shown_on: Console) -> None:
    """Print the table, and last what to take."""
    what = ", ".join(f"{m.sites} x [{m.groups * m.rows}, {m.channels}] {_dtype(m)}" for m in case.messages[:3]) + (
        ", ..." if len(case.messages) > 3 else ""
    )
    on = case.messages[0].tensors[0].device
    threads = torch.get_num_threads()
    machine = f"{threads} thread{'s' * (threads > 1)}" if on.type == "cpu" else torch.cuda.get_device_name(on)
    compute = f"{1e3 * case.compute_s:g} ms of computing a step" if case.compute_s else "computing left out"
    table = fitting_table(
        _columns(rows),
        rows,
        shown_on,
        padding=(0, 1, 0, 0),
        title=escape(f"{what}; {case.op}, {case.ranks} ranks, {case.steps} steps; {case.link}; {compute}"),
        caption=f"Of one rank. Measured here, on one process alone ({machine}): codec, the encoding and decoding of a "
        f"step{', and NMSE, of residuals on the trace' if case.trace else ''}. Estimated: bytes, link at its nominal "
        "speed, step and request as sums of computing, link and codec, of which a run overlaps some. "
        f"{'' if case.trace else 'NMSE needs --trace. '}A wider terminal shows more, such as the link speed below "
        "which a choice pays",
    )
    shown_on.print(table)
    shown_on.print(escape(advice[1]))
