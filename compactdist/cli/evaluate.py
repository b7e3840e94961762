"""``compactdist evaluate``: play recorded activations through the residual loop, frame by frame, and measure."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape
from torch import Tensor

from compactdist.cli.common import Column, fitting_table
from compactdist.cli.score import Score
from compactdist.codecs import Codec
from compactdist.config import Options
from compactdist.errors import CompactDistError, ConfigError
from compactdist.observe.trace import Trace, TraceError
from compactdist.presets import PRESETS, expand
from compactdist.state import (
    Layout,
    MatrixView,
    RateControl,
    StreamConfig,
    StreamDecoder,
    StreamEncoder,
    Target,
    Wanted,
    check_steered,
)

__all__ = [
    "DEFAULT_LAYOUT",
    "GivenLayout",
    "Played",
    "Recorded",
    "Setting",
    "parse_layout",
    "play",
    "play_settings",
    "play_sites",
    "recorded",
    "settings_of_codecs",
    "settings_of_presets",
    "show",
    "spaced",
    "to_json",
]


@dataclass(frozen=True)
class Setting:
    """One row of the table: the codec of residuals, how its streams predict and send keyframes, and their target."""

    codec: Codec
    config: StreamConfig
    target: Target | None = None


GivenLayout = tuple[str, dict[str, int]]
"""A pattern of ``Layout``, and sizes of axes."""
DEFAULT_LAYOUT: GivenLayout = ("(g n c) -> g n c", {})


def parse_layout(text: str | None) -> GivenLayout:
    """A layout as the command line has it: ``"(g n h d) -> 1 n (h g d), d=64"``.

    Of a tensor of a trace ``g`` are the groups, ``n`` the rows of each, ``c`` the channels; other axes get sizes behind
    the pattern, and one may be left out.

    Raises:
        ConfigError: what stands behind the pattern are no sizes.
    """
    if text is None:
        return DEFAULT_LAYOUT
    pattern, *rest = (part.strip() for part in text.split(","))
    found = [re.fullmatch(r"(\w+)\s*=\s*(\d+)", part) for part in rest]
    if not all(found):
        raise ConfigError(
            f"--layout {text!r}: behind the pattern stand sizes of axes, as in '(g n h d) -> 1 n (h g d), d=64'"
        )
    return pattern, {one[1]: int(one[2]) for one in found if one}


@dataclass(frozen=True)
class Recorded:
    """A site of a trace.

    Attributes:
        site: its name.
        x: ``[steps, N, C]``.
        groups: matrices that the ``N`` rows consist of.
        layout: how each step is read, see :func:`parse_layout`.
    """

    site: str
    x: Tensor
    groups: int
    layout: GivenLayout = DEFAULT_LAYOUT

    @cached_property
    def hint(self) -> MatrixView:
        """The matrix view of each step, as a layout hint gives it.

        Raises:
            LayoutError: the layout does not fit.
        """
        (_, rows, channels), (pattern, sizes) = self.x.shape, self.layout
        known = {"g": self.groups, "n": rows // self.groups, "c": channels}
        axes = set(re.findall(r"\w+", pattern.partition("->")[0]))
        ours = {axis: size for axis, size in known.items() if axis in axes}
        return Layout(pattern, **ours | sizes).resolve(rows * channels)


@dataclass(frozen=True)
class Played:
    """A frame that was made and decoded.

    Attributes:
        site, step: where it belongs.
        x, x_hat: ``[N * C]``, what was sent and its reconstruction, which the site's next frame overwrites.
        wire_bytes: its size.
        keyframe: it carries the tensor itself.
        rate: number of its rate; 0 where the codec has just one.
    """

    site: str
    step: int
    x: Tensor
    x_hat: Tensor
    wire_bytes: int
    keyframe: bool
    rate: int


def spaced(recorded_steps: int, steps: int) -> list[int]:
    """``steps`` of the numbers 0 to ``recorded_steps - 1``, evenly spaced, the first and the last among them."""
    last, gaps = recorded_steps - 1, steps - 1
    return [(2 * i * last + gaps) // (2 * gaps) for i in range(steps)]


def recorded(
    trace: Trace,
    steps: int | None,
    keyframes: int,
    report: Callable[[str], None] = lambda site: None,
    layout: GivenLayout = DEFAULT_LAYOUT,
) -> Iterator[Recorded]:
    """Load the sites of a trace one by one.

    Args:
        trace: the trace.
        steps: how many of each site's steps to take, evenly spaced, at least 2; ``None``: all.
        keyframes: how many of the steps taken are sent as keyframes.
        report: called with each site's name before it is loaded.
        layout: how each step of every site is read.

    Raises:
        TraceError: a tensor cannot be played, has fewer than ``steps`` steps, or none after the keyframes.
    """
    for site in trace.sites:
        report(site)
        x = trace.load(site)
        if steps is not None and steps > x.shape[0]:
            raise TraceError(
                f"{trace.path}, tensor '{site}' has {x.shape[0]} steps, and --steps {steps} asks for more: record more "
                "steps, or ask for fewer"
            )
        if steps is not None:
            x = x[spaced(x.shape[0], steps)]
        if x.shape[0] <= keyframes:
            raise TraceError(
                f"{trace.path}, tensor '{site}' has {x.shape[0]} steps, and the first {keyframes} are keyframes: "
                "record more steps, or evaluate with a smaller --warmup or a larger --steps"
            )
        yield Recorded(site, x, trace.groups(site, x.shape[1]), layout)


def settings_of_codecs(codecs: Mapping[str, Codec], config: StreamConfig, targets: Sequence[str]) -> dict[str, Setting]:
    """Codecs by name; with targets, each codec with each of them, as ``codec target``.

    Raises:
        ConfigError: a target is none, or a codec has just one rate.
    """
    if not targets:
        return {name: Setting(codec, config) for name, codec in codecs.items()}
    made = {}
    for name, codec in codecs.items():
        for target in map(Target.parse, targets):
            check_steered(codec, target)
            made[f"{name} {target}"] = Setting(codec, config, target)
    return made


def settings_of_presets(names: Sequence[str]) -> dict[str, Setting]:
    """Presets of ``wrap`` by their names, all of them for ``all``.

    Raises:
        ConfigError: there is no such preset.
    """
    made = {}
    for name in dict.fromkeys(PRESETS if "all" in names else names):
        options = Options(**expand({"preset": name}), find_layout=False)
        made[name] = Setting(options.default_codec, options.stream)
    return made


def play(
    trace: Trace,
    codecs: Mapping[str, Codec],
    config: StreamConfig,
    report: Callable[[str], None] = lambda site: None,
) -> dict[str, Score]:
    """Play codecs under one configuration; see :func:`play_settings`."""
    return play_settings(trace, {name: Setting(codec, config) for name, codec in codecs.items()}, None, report)


def play_settings(
    trace: Trace,
    settings: Mapping[str, Setting],
    steps: int | None = None,
    report: Callable[[str], None] = lambda site: None,
    layout: GivenLayout = DEFAULT_LAYOUT,
) -> dict[str, Score]:
    """Play every site of a trace through an encoder and a decoder of every setting.

    Args:
        trace: the trace to play.
        settings: codecs with their configurations, by name; the layout gives their matrix view, so no search is needed.
        steps: how many of the recorded steps to play, evenly spaced, at least 2; ``None``: all.
        report: called with each site's name before it is played.
        layout: how each step is read.

    Returns:
        A score by the setting's name.

    Raises:
        TraceError: a tensor cannot be played, or there are no steps after the warm-up.
        CompactDistError: encoder and decoder disagree.
    """
    scores = {name: Score() for name in settings}
    keyframes = max([1, *(setting.config.warmup_steps for setting in settings.values())])
    steered = {name: setting for name, setting in settings.items() if setting.target is not None}
    kept = []
    for entry in recorded(trace, steps, keyframes, report, layout):
        for name, setting in settings.items():
            if name not in steered:
                play_sites(scores[name], setting, [entry])
        if steered:
            kept.append(entry)
    for name, setting in steered.items():
        play_sites(scores[name], setting, kept)
    return scores


@torch.no_grad()
def play_sites(
    score: Score,
    setting: Setting,
    entries: Sequence[Recorded],
    watch: Callable[[Played], None] | None = None,
    *,
    control: RateControl | None = None,
) -> None:
    """Play sites side by side, step by step, as one request, and count their frames in ``score``.

    Args:
        score: what is counted so far.
        setting: codec and configuration of the streams.
        entries: the sites.
        watch: called with every frame once both ends hold the same bits.
        control: of the rates, with what it learnt from an earlier request; ``None``: one that knows nothing.

    Raises:
        CompactDistError: encoder and decoder disagree.
    """
    config = setting.config
    ends = [(StreamEncoder(config, 0, entry.site), StreamDecoder(config, 0, entry.site)) for entry in entries]
    if setting.target is not None:
        control = control or RateControl(setting.target)
        for (encoder, _), entry in zip(ends, entries, strict=True):
            encoder.steers = control.stream((entry.site, 0))
    for step in range(max(len(entry.x) for entry in entries)):
        for (encoder, decoder), entry in zip(ends, entries, strict=True):
            if step < len(entry.x):
                played = _play_frame(score, setting, encoder, decoder, entry, step)
                if watch is not None:
                    watch(played)
    if control is not None:
        score.met = control.met()
    score.state_bytes += sum(encoder.state_bytes for encoder, _ in ends)


def _play_frame(
    score: Score, setting: Setting, encoder: StreamEncoder, decoder: StreamDecoder, entry: Recorded, step: int
) -> Played:
    codec, hint, flat = setting.codec, entry.hint, entry.x[step].reshape(-1)
    warm_up = step < max(1, setting.config.warmup_steps)
    keyframe = warm_up or encoder.is_fresh(flat.numel(), flat.dtype)
    wanted = Wanted(step=step, value=True, hint=hint, may_surprise=True)
    staged = encoder.stage(flat, codec, wanted, keyframe=keyframe)
    encoder.commit(staged)
    x_hat = decoder.decode(staged.frame, codec, flat.numel(), flat.dtype, step=step, hint=hint)
    _check_equal(encoder, decoder, staged.value, x_hat, f"{entry.site}, step {step}, codec {codec!r}")
    score.count(entry.site, step, flat, x_hat, staged.frame.numel(), keyframe=warm_up)
    return Played(entry.site, step, flat, x_hat, staged.frame.numel(), staged.header.is_keyframe, staged.header.rate)


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
    """Plain values by row; ``nmse_db`` and ``request_worst_step`` are ``None`` for an exact codec."""
    return {
        name: {
            "bits_per_element": score.residuals.bits_per_element,
            "request_bits_per_element": score.request.bits_per_element,
            "request_ratio": score.ratio,
            "rel_error": score.residuals.rel_error,
            "request_rel_error": score.request.rel_error,
            "nmse_db": score.residuals.nmse_db if math.isfinite(score.residuals.nmse_db) else None,
            "worst_step_rel_error": score.residuals.worst[0],
            "request_worst_step_rel_error": score.request.worst[0],
            "request_worst_step": score.request.worst[2] if score.request.worst[0] else None,
            "state_bytes": score.state_bytes,
        }
        | ({} if score.met is None else {"target": score.met.to_dict()})
        for name, score in scores.items()
    }


def _nmse(score: Score) -> str:
    return f"{score.residuals.nmse_db:.2f}" if math.isfinite(score.residuals.nmse_db) else "exact"


_COLUMNS: tuple[Column, ...] = (
    Column("codec", lambda row: escape(row[0]), left=True),
    Column("b/el", lambda row: f"{row[1].residuals.bits_per_element:.3f}"),
    Column("request\nb/el", lambda row: f"{row[1].request.bits_per_element:.3f}"),
    Column("ratio", lambda row: f"{row[1].ratio:.2f}"),
    Column("error", lambda row: f"{row[1].residuals.rel_error:.2e}"),
    Column("request\nerror", lambda row: f"{row[1].request.rel_error:.2e}"),
    Column("worst", lambda row: f"{row[1].request.worst[0]:.2e}"),
    Column("at\nstep", lambda row: str(row[1].request.worst[2]) if row[1].request.worst[0] else "-"),
    Column("NMSE\ndB", lambda row: _nmse(row[1]), spare=1),
    Column("state\nMB", lambda row: f"{row[1].state_bytes / 1e6:.3f}", spare=2),
)


def _title(trace: Trace, config: StreamConfig | None, steps: int | None, layout: GivenLayout) -> str:
    said = [f"{len(trace.sites)} sites"]
    if layout != DEFAULT_LAYOUT:
        said.append(f"read as {', '.join([layout[0], *(f'{axis}={size}' for axis, size in layout[1].items())])}")
    if steps is not None:
        said.append(f"{steps} steps")
    if config is not None:
        damping = "" if config.damping is None else f", damping {config.damping:g}"
        said.append(f"order {config.order}{damping}, warm-up {config.warmup_steps}")
        if config.state != "exact":
            said.append(f"{config.state} state")
        if config.keyframe is not None:
            said.append(f"{config.keyframe.codec_id} keyframes")
    return f"{escape(str(trace.path))}: {', '.join(said)}"


def show(
    trace: Trace,
    config: StreamConfig | None,
    scores: Mapping[str, Score],
    shown_on: Console,
    steps: int | None = None,
    layout: GivenLayout = DEFAULT_LAYOUT,
) -> None:
    """Print the table.

    Args:
        trace: what was played.
        config: of the codecs; ``None`` where there are presets only.
        scores: by row.
        shown_on: the console.
        steps: how many of the recorded steps were played; ``None`` for all.
        layout: how they were read.
    """
    table = fitting_table(
        _COLUMNS,
        list(scores.items()),
        shown_on,
        padding=(0, 1, 0, 0),  # ten columns
        title=_title(trace, config, steps, layout),
        caption="b/el: wire bits per element of a residual frame, header and scales included; request: of all frames, "
        "keyframes too; ratio: 16 bits over these; error: mean of ||x - x_hat|| / ||x|| over steps and sites, without "
        "keyframes and with them; worst: the largest of all",
    )
    shown_on.print(table)
