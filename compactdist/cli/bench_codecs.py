"""``compactdist bench codecs``: encoding and decoding against a plain copy of the same tensor."""

from __future__ import annotations

import math
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape
from torch import Tensor

from compactdist import __version__
from compactdist.cli.common import Column, fitting_table
from compactdist.cli.subjects import Subject
from compactdist.errors import ConfigError

__all__ = ["DTYPES", "as_json", "measure", "parse_shape", "show"]

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
_WARM_UP_ROUNDS = 2
_BITS_TO_DB = 20 * math.log10(2)  # 6.0206


def parse_shape(text: str) -> tuple[int, int]:
    """(N, C) from ``NxC``.

    Raises:
        ConfigError: anything else.
    """
    rows, _, channels = text.lower().partition("x")
    if not (rows.isdecimal() and channels.isdecimal() and int(rows) and int(channels)):
        raise ConfigError(f"--shape {text!r} is not NxC with positive numbers, for instance 1088x3072")
    return int(rows), int(channels)


def measure(
    subjects: Sequence[Subject], shape: tuple[int, int], dtype: torch.dtype, rounds: int, seconds: float
) -> list[dict[str, Any]]:
    """Time all subjects on one unit Gaussian tensor, taking turns, each beside a copy of the tensor.

    Args:
        subjects: what to time.
        shape: ``[N, C]`` of the tensor.
        dtype: of the tensor.
        rounds: how often each subject is timed.
        seconds: no round begins after this time, except the first three.

    Returns:
        A row per subject: times in ms, bits per element, NMSE and gap in dB.
    """
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float32, device="cpu").to(dtype)
    able = [subject for subject in subjects if subject.missing is None]
    sent: dict[str, Any] = {}
    quality: dict[str, tuple[float, float]] = {}
    for subject in able:
        with subject.around():
            sent[subject.name] = subject.encode(x)
            quality[subject.name] = _quality(subject, sent[subject.name], x)
    encode, decode = _take_turns(able, sent, x, rounds, seconds)
    copies = [pair[0] for pairs in (*encode.values(), *decode.values()) for pair in pairs]
    copy_ns = statistics.median(copies) if copies else math.nan
    rows = []
    for subject in subjects:
        row: dict[str, Any] = {"codec": subject.name, "dtype": str(dtype).removeprefix("torch.")}
        if subject.missing is not None:
            rows.append(row | {"note": subject.missing})
            continue
        bits, nmse_db = quality[subject.name]
        sent_nbytes = math.ceil(bits * x.numel() / 8)
        touched = [times * x.nbytes + sent_nbytes for times in subject.touched]
        row |= {"bits_per_element": bits, "nmse_db": nmse_db if math.isfinite(nmse_db) else None}
        row["gap_db"] = _BITS_TO_DB * bits + nmse_db if math.isfinite(nmse_db) else None
        row |= {
            "encode_bytes_touched": touched[0],
            "decode_bytes_touched": touched[1],
            "copy_ms": copy_ns / 1e6,
            "copy_gb_s": 2 * x.nbytes / copy_ns,
        }
        row |= _timings("encode", encode[subject.name], x, touched[0], copy_ns)
        row |= _timings("decode", decode[subject.name], x, touched[1], copy_ns)
        rows.append(row)
    return rows


_Pairs = dict[str, list[tuple[int, int]]]


def _take_turns(
    able: Sequence[Subject], sent: dict[str, Any], x: Tensor, rounds: int, seconds: float
) -> tuple[_Pairs, _Pairs]:
    """Nanoseconds of a copy of ``x`` and of the call right after it, by subject: encode calls, then decode calls."""
    target = torch.empty_like(x)
    encode: _Pairs = {subject.name: [] for subject in able}
    decode: _Pairs = {subject.name: [] for subject in able}

    def beside_a_copy(body: Callable[[], Any]) -> tuple[int, int]:
        target.copy_(x)
        return _nanoseconds(lambda: target.copy_(x)), _nanoseconds(body)

    began = time.monotonic()
    for turn in range(_WARM_UP_ROUNDS + rounds):
        if turn >= _WARM_UP_ROUNDS + 3 and time.monotonic() - began > seconds:
            break
        for subject in able:
            payload = sent[subject.name]
            with subject.around():
                first = beside_a_copy(lambda s=subject: s.encode(x))  # type: ignore[misc]
                second = beside_a_copy(lambda s=subject, p=payload: s.decode(p, x))  # type: ignore[misc]
            if turn >= _WARM_UP_ROUNDS:
                encode[subject.name].append(first)
                decode[subject.name].append(second)
    return encode, decode


def _timings(name: str, pairs: list[tuple[int, int]], x: Tensor, touched: int, copy_ns: float) -> dict[str, Any]:
    ns = statistics.median(own for _, own in pairs)
    low, middle, high = statistics.quantiles((own / copy for copy, own in pairs), n=4, method="inclusive")
    return {
        f"{name}_ms": ns / 1e6,
        f"{name}_x_copy": middle,
        f"{name}_x_copy_quartiles": [low, high],
        f"{name}_gelem_s": x.numel() / ns,
        f"{name}_copy_bandwidth_percent": 100 * (touched / ns) / (2 * x.nbytes / copy_ns),
        "rounds": len(pairs),
    }


def _nanoseconds(body: Callable[[], Any]) -> int:
    began = time.perf_counter_ns()
    body()
    return max(1, time.perf_counter_ns() - began)


def _quality(subject: Subject, sent: Any, x: Tensor) -> tuple[float, float]:
    """Wire bits per element, and the error of a round trip in dB."""
    exact = x.double()
    error = float((subject.decode(sent, x).double() - exact).square().sum() / exact.square().sum())
    return 8 * subject.wire_nbytes(sent) / x.numel(), 10 * math.log10(error) if error else -math.inf


def _cell(name: str, digits: int, factor: float = 1.0, none: str = "-") -> Callable[[Any], str]:
    """The text of a row's number; ``none`` where it is ``None``, nothing where the row could not be measured."""

    def cell(row: dict[str, Any]) -> str:
        if "note" in row:
            return ""
        return none if row[name] is None else f"{row[name] * factor:.{digits}f}"

    return cell


_COLUMNS = (
    Column("codec", lambda row: escape(f"{row['codec']}: {row['note']}" if "note" in row else row["codec"]), left=True),
    Column("enc\nx copy", _cell("encode_x_copy", 1)),
    Column("dec\nx copy", _cell("decode_x_copy", 1)),
    Column("enc\nGelem/s", _cell("encode_gelem_s", 3), spare=2),
    Column("dec\nGelem/s", _cell("decode_gelem_s", 3), spare=2),
    Column("enc\nMB", _cell("encode_bytes_touched", 1, 1e-6), spare=3),
    Column("dec\nMB", _cell("decode_bytes_touched", 1, 1e-6), spare=3),
    Column("enc\n% copy", _cell("encode_copy_bandwidth_percent", 1), spare=1),
    Column("dec\n% copy", _cell("decode_copy_bandwidth_percent", 1), spare=1),
    Column("\nb/el", _cell("bits_per_element", 3)),
    Column("NMSE\ndB", _cell("nmse_db", 2, none="exact")),
    Column("gap\ndB", _cell("gap_db", 2)),
)


def show(shape: tuple[int, int], rows: Sequence[dict[str, Any]], shown_on: Console) -> None:
    """Print the table."""
    table = fitting_table(
        _COLUMNS,
        rows,
        shown_on,
        lambda row: str(row["dtype"]),
        title=f"[{shape[0]}, {shape[1]}] unit Gaussian, {torch.get_num_threads()} threads".replace("[", "\\["),
        caption="Codecs take a step of a stream: tensor and base in, payload and new base out (enc), and back, the "
        "base in place (dec); the others code the tensor itself. x copy: time as a multiple of Tensor.copy_ "
        "of the same tensor, timed next to it; MB: what a step has to read and write; % copy: that per "
        "second, as a share of the copy's (which reads and writes the tensor); b/el: wire bits per element, "
        "scales and header included; gap: distance to the Gaussian rate-distortion bound, 6.0206 b/el + "
        "NMSE dB. 'eager torch': the codec on torch's own operations. A copy that fits the caches is faster "
        "than memory, so multiples and shares of small tensors look worse than those of large ones. A wider "
        "terminal shows more columns, --json all",
    )
    shown_on.print(table)


def as_json(shape: tuple[int, int], rows: Sequence[dict[str, Any]], load: float) -> dict[str, Any]:
    """The rows with command, versions, machine and load, to judge them by."""
    about = {
        "command": " ".join(["compactdist", *sys.argv[1:]]),
        "torch": torch.__version__,
        "compactdist": __version__,
        "python": platform.python_version(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads",
        "load_average_before": round(load, 2),
        "shape": list(shape),
    }
    return {**about, "rows": list(rows)}
