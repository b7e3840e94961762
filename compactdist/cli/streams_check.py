"""``compactdist doctor``: a keyframe and two residuals through encoder and decoder, for every preset or codec."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from compactdist import codecs
from compactdist.cli.common import Column, fitting_table, now
from compactdist.cli.findings import Finding
from compactdist.presets import PRESETS
from compactdist.state import Layout, ResidualDecoder, ResidualEncoder

__all__ = ["StreamCheck", "check_streams", "changing", "show_streams", "stream_findings", "streams"]

ROWS, CHANNELS = 512, 128
"""Large enough for the compiled kernels, which small tensors do without."""

_FRAMES = 3
_LARGEST_ERROR = 0.5
"""No codec of the library is as wrong as that on tensors of which a hundredth of the energy is new in each step."""


@dataclass(frozen=True)
class StreamCheck:
    """What came of one stream.

    Attributes:
        name: preset or codec.
        device: where it ran.
        raw_bytes: of a tensor.
        keyframe_bytes, residual_bytes: of the first frame and of the last.
        rel_error: ``||x - x_hat|| / ||x||`` of the last frame.
        ms: encoding and decoding of the last frame.
        problem: what is wrong; empty if nothing is.
    """

    name: str
    device: str
    raw_bytes: int = 0
    keyframe_bytes: int = 0
    residual_bytes: int = 0
    rel_error: float | None = None
    ms: float | None = None
    problem: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


def streams(every_codec: bool) -> dict[str, dict[str, Any]]:
    """Arguments of both ends by name: the presets', and those of each codec that is registered if wanted."""
    chosen: dict[str, dict[str, Any]] = {name: asdict(preset) for name, preset in PRESETS.items()}
    if every_codec:
        chosen |= {f"codec {name}": {"codec": name} for name in codecs.list()}
    return chosen


def changing(frames: int, rows: int, channels: int, dtype: torch.dtype, seed: int = 0) -> list[Tensor]:
    """Tensors ``[rows, channels]`` of unequal channels, a tenth of each new against the one before it."""
    generator = torch.Generator().manual_seed(seed)
    scale = torch.rand(channels, generator=generator, dtype=torch.float32, device="cpu") + 0.1
    x, made = torch.randn(rows, channels, generator=generator, dtype=torch.float32, device="cpu") * scale, []
    for _ in range(frames):
        made.append(x.to(dtype))
        x = x + 0.1 * torch.randn(rows, channels, generator=generator, dtype=torch.float32, device="cpu") * scale
    return made


def check_streams(chosen: Mapping[str, Mapping[str, Any]], devices: Sequence[torch.device]) -> list[StreamCheck]:
    """Play each stream on each device. What one raises is its problem, and the others go on."""
    tensors = changing(_FRAMES, ROWS, CHANNELS, torch.bfloat16)
    checked = []
    for device in devices:
        placed = [x.to(device) for x in tensors]
        for name, options in chosen.items():
            try:
                checked.append(_played(name, options, placed))
            except Exception as error:  # a broken installation raises anything
                checked.append(StreamCheck(name, str(device), problem=f"{type(error).__name__}: {error}"))
    return checked


def _played(name: str, options: Mapping[str, Any], tensors: Sequence[Tensor]) -> StreamCheck:
    layout = Layout("(n c) -> 1 n c", c=CHANNELS)
    encoder, decoder = ResidualEncoder(layout=layout, **options), ResidualDecoder(layout=layout, **options)
    sizes, problem, ms = [], "", 0.0
    x = x_hat = tensors[0]
    for number, x in enumerate(tensors):
        began = now(x.device)
        frame = encoder.encode(x)
        x_hat = decoder.decode(frame)
        ms = (now(x.device) - began) * 1e3
        sizes.append(frame.numel())
        sent = x if encoder.codec.lossless else encoder.state
        if sent is None or not _same_bytes(sent, x_hat):
            problem = problem or f"frame {number}: the decoded tensor is not the sender's reconstruction"
    error = float((x.double() - x_hat.double()).norm() / x.double().norm())
    if not error < _LARGEST_ERROR:
        problem = problem or f"an error of {error:.3g} is larger than {_LARGEST_ERROR}"
    return StreamCheck(name, str(x.device), x.nbytes, sizes[0], sizes[-1], error, ms, problem)


def _same_bytes(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and torch.equal(a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8))


def stream_findings(checked: Sequence[StreamCheck]) -> list[Finding]:
    """A finding for each stream that failed, or one for all where none did."""
    remedy = "report it as a bug, with the output of compactdist doctor --json FILE"
    wrong = [
        Finding("Self check", f"{one.name} on {one.device}", one.problem, "error", remedy)
        for one in checked
        if one.problem
    ]
    told = f"all {len(checked)} are decoded to the byte as the sender has them"
    return wrong or [Finding("Self check", "streams", told)]


def _of(name: str, text: Callable[[Any], str]) -> Callable[[StreamCheck], str]:
    return lambda row: "-" if row.rel_error is None else text(getattr(row, name))


_COLUMNS = (
    Column("stream", lambda row: row.name, left=True),
    Column("device", lambda row: row.device, left=True, spare=1),
    Column("raw\nbytes", _of("raw_bytes", str)),
    Column("keyframe\nbytes", _of("keyframe_bytes", str)),
    Column("residual\nbytes", _of("residual_bytes", str)),
    Column("\nratio", lambda row: f"{row.raw_bytes / row.residual_bytes:.1f}" if row.residual_bytes else "-"),
    Column("\nerror", _of("rel_error", lambda error: f"{error:.1e}")),
    Column("\nms", _of("ms", lambda ms: f"{ms:.2f}")),
    Column("both\nends", lambda row: "FAILED" if row.problem else "equal"),
)


def show_streams(checked: Sequence[StreamCheck], shown_on: Console) -> None:
    """Print the table."""
    table = fitting_table(
        _COLUMNS,
        checked,
        shown_on,
        padding=(0, 1, 0, 0),
        title=f"Self check: \\[{ROWS}, {CHANNELS}] bfloat16, a keyframe and two residuals",
        caption="ratio: raw over residual bytes; error: ||x - x_hat|| / ||x|| of the last frame; ms: its encoding and "
        "decoding, one tensor alone (compactdist bench codecs measures)",
    )
    shown_on.print(table)
