"""``compactdist evaluate``: play recorded activations through the residual loop, frame by frame, and measure."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape
from torch import Tensor

from compactdist.cli.common import Column, fitting_table
from compactdist.codecs import Codec
from compactdist.errors import CompactDistError
from compactdist.observe.trace import Trace, TraceError
from compactdist.state import MatrixView, StreamConfig, StreamDecoder, StreamEncoder

__all__ = ["Score", "play", "show", "to_json"]


@dataclass
class Score:
    """Bytes and errors of one codec on a trace.

    Attributes:
        elements, wire_bytes: of all frames but the keyframes of the warm-up; headers and scales included.
        request_elements, request_bytes: of all frames.
        error_energy, energy: sums of squares over the frames counted in ``elements``.
        relative_error_sum, frames: sum of ``||x - x_hat|| / ||x||`` over frames, and their number; frames with
            ``||x|| = 0`` are left out.
        worst: (relative error, site, step) of the frame with the largest relative error.
        state_bytes: bytes that the sender holds after the last step, over all sites.
    """

    elements: int = 0
    wire_bytes: int = 0
    request_elements: int = 0
    request_bytes: int = 0
    error_energy: float = 0.0
    energy: float = 0.0
    relative_error_sum: float = 0.0
    frames: int = 0
    worst: tuple[float, str, int] = (0.0, "", -1)
    state_bytes: int = 0

    @property
    def bits_per_element(self) -> float:
        """Wire bits per element in the steady state."""
        return 8 * self.wire_bytes / self.elements

    @property
    def request_bits_per_element(self) -> float:
        """Wire bits per element over the whole request, keyframes included."""
        return 8 * self.request_bytes / self.request_elements

    @property
    def rel_error(self) -> float:
        """Mean relative error over steps and sites."""
        return self.relative_error_sum / max(1, self.frames)

    @property
    def nmse_db(self) -> float:
        """``10 log10`` of error energy over energy; minus infinity for an exact codec."""
        if self.error_energy == 0:
            return -math.inf
        return 10 * math.log10(self.error_energy / self.energy) if self.energy else math.inf

    def count(self, site: str, step: int, x: Tensor, x_hat: Tensor, wire_bytes: int) -> None:
        """Count a frame that is no keyframe of the warm-up."""
        exact = x.double()
        error, energy = float((x_hat.double() - exact).square().sum()), float(exact.square().sum())
        self.elements += x.numel()
        self.wire_bytes += wire_bytes
        self.error_energy += error
        self.energy += energy
        if energy > 0:
            relative = math.sqrt(error / energy)
            self.relative_error_sum += relative
            self.frames += 1
            self.worst = max(self.worst, (relative, site, step), key=lambda worst: worst[0])


def play(
    trace: Trace,
    codecs: Mapping[str, Codec],
    config: StreamConfig,
    report: Callable[[str], None] = lambda site: None,
) -> dict[str, Score]:
    """Play every site of a trace through an encoder and a decoder of every codec.

    Args:
        trace: the trace to play.
        codecs: codecs by name.
        config: configuration of the streams; ``[N, C]`` gives their matrix view, so no search is needed.
        report: called with each site's name before it is played.

    Returns:
        A score by the codec's name.

    Raises:
        TraceError: a tensor cannot be played, or there are no steps after the warm-up.
        CompactDistError: encoder and decoder disagree.
    """
    scores = {name: Score() for name in codecs}
    for site in trace.sites:
        report(site)
        x = trace.load(site)
        steps, rows, channels = x.shape
        keyframes = max(1, config.warmup_steps)
        if steps <= keyframes:
            raise TraceError(
                f"{trace.path}, tensor '{site}' has {steps} steps, and the first {keyframes} are keyframes: record "
                "more steps, or evaluate with a smaller --warmup"
            )
        groups = trace.groups(site, rows)
        hint = MatrixView(rows * channels, groups, rows // groups, channels)
        for name, codec in codecs.items():
            _play_site(scores[name], codec, config, site, x, hint, keyframes)
    return scores


@torch.no_grad()
def _play_site(
    score: Score, codec: Codec, config: StreamConfig, site: str, x: Tensor, hint: MatrixView, keyframes: int
) -> None:
    encoder, decoder = StreamEncoder(config, 0, site), StreamDecoder(config, 0, site)
    for step, value in enumerate(x):
        flat = value.reshape(-1)
        staged = encoder.stage(flat, codec, keyframe=step < keyframes, want_value=True)
        encoder.commit(staged, hint)
        x_hat = decoder.decode(staged.frame, codec, flat.numel(), flat.dtype, hint=hint)
        _check_equal(encoder, decoder, staged.value, x_hat, f"{site}, step {step}, codec {codec!r}")
        nbytes = staged.frame.numel()
        score.request_elements += flat.numel()
        score.request_bytes += nbytes
        if step >= keyframes:
            score.count(site, step, flat, x_hat, nbytes)
    score.state_bytes += encoder.state_bytes


def _check_equal(
    encoder: StreamEncoder, decoder: StreamDecoder, value: Tensor | None, x_hat: Tensor, where: str
) -> None:
    """Raise CompactDistError unless both ends hold the same bits."""
    ours = value, *encoder.predictor.held, *encoder.codec_memory
    theirs = x_hat, *decoder.predictor.held, *decoder.codec_memory
    equal = len(ours) == len(theirs) and all(
        a is not None and b is not None and _same_bits(a, b) for a, b in zip(ours, theirs, strict=True)
    )
    if not equal:
        raise CompactDistError(f"{where}: encoder and decoder hold different states; please report this as a bug")


def _same_bits(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and torch.equal(a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8))


def to_json(scores: Mapping[str, Score]) -> dict[str, dict[str, Any]]:
    """Plain values by codec; ``nmse_db`` is ``None`` for an exact codec."""
    return {
        name: {
            "bits_per_element": score.bits_per_element,
            "request_bits_per_element": score.request_bits_per_element,
            "rel_error": score.rel_error,
            "nmse_db": score.nmse_db if math.isfinite(score.nmse_db) else None,
            "worst_step_rel_error": score.worst[0],
            "state_bytes": score.state_bytes,
        }
        for name, score in scores.items()
    }


def _nmse(score: Score) -> str:
    return f"{score.nmse_db:.2f}" if math.isfinite(score.nmse_db) else "exact"


_COLUMNS: tuple[Column, ...] = (
    Column("codec", lambda row: escape(row[0]), left=True),
    Column("b/el", lambda row: f"{row[1].bits_per_element:.3f}"),
    Column("request", lambda row: f"{row[1].request_bits_per_element:.3f}"),
    Column("error", lambda row: f"{row[1].rel_error:.2e}"),
    Column("NMSE\ndB", lambda row: _nmse(row[1])),
    Column("worst", lambda row: f"{row[1].worst[0]:.2e}"),
    Column("at\nstep", lambda row: str(row[1].worst[2]) if row[1].worst[0] else "-"),
    Column("state\nMB", lambda row: f"{row[1].state_bytes / 1e6:.3f}"),
)


def show(trace: Trace, config: StreamConfig, scores: Mapping[str, Score], shown_on: Console) -> None:
    """Print the table."""
    loop = f"order {config.order}" + ("" if config.damping is None else f", damping {config.damping:g}")
    loop += f", {config.state} state" if config.state != "exact" else ""
    table = fitting_table(
        _COLUMNS,
        list(scores.items()),
        shown_on,
        title=f"{escape(str(trace.path))}: {len(trace.sites)} sites, {loop}, warm-up {config.warmup_steps}",
        caption="b/el: wire bits per element of a residual frame, header and scales included; request: of all frames, "
        "keyframes too; error: mean of ||x - x_hat|| / ||x|| over steps and sites, without keyframes; worst: the "
        "largest of them; state: what the sender holds",
    )
    shown_on.print(table)
