"""Draws the rows of `chart`: error in dB over the bytes of a request, a panel for each route."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes

Row = dict[str, Any]
TITLES = {"ring": "ring of 2 ranks", "ulysses": "Ulysses on 2 ranks"}
METHODS = ("DistriFusion", "PipeFusion")  # shown beside the codecs of every route
SHOWN_ABOVE_DB = -100  # what is exact differs from the pictures of one process by rounding alone
TICKS = (1, 2, 5, 10, 20, 50)
STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "chart",
    "font.size": 9,
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],  # the whole list would be written beside every word
}


@dataclass(frozen=True)
class Series:
    """Points of one colour, with a line through them if they are one codec, or one kind of codec, at several rates.

    Attributes:
        label: in the legend.
        family: of the rows.
        colour, marker, line: in matplotlib's words; `line` is empty for points alone.
        only: names of the rows; empty for all of the family.
        at: of a name beside its point, in typographic points; `None` writes no names.
    """

    label: str
    family: str
    colour: str
    marker: str = "o"
    line: str = ""
    only: tuple[str, ...] = ()
    at: tuple[int, int] | None = (5, 2)


_RATES = ("transform:bits=0.5", "transform", "transform:bits=2", "transform:bits=4")
SERIES = (
    Series("quantizers", "codec", "#4269d0", "o", "-", ("binary", "ternary", "int2", "int3", "int4", "int8")),
    Series("order 2", "order 2", "#97bbf5", "o", "--", at=None),
    Series("order auto", "order auto", "#6cc5b0", "o", "--", ("binary", "int2", "int4"), None),
    Series("transform", "transform", "#e4572e", "o", "-", _RATES, (-5, -8)),
    Series("transform, order auto", "order auto", "#efb118", "o", "--", _RATES, None),
    Series("transform, int4 keyframe", "transform", "#e4572e", "s", at=(5, 2)),
    Series("other codecs", "codec", "#4269d0", "v"),
    Series("presets", "preset", "#222222", "*", at=(5, -9)),
    Series("targets of rates", "target", "#a463f2", "D", at=(-6, -8)),
    Series("keyframe as it is", "raw keyframe", "#9c6b4e", "s"),
    Series("binary without", "without", "#77797f", "x"),
    Series("DistriFusion", "DistriFusion", "#3ca951", "P"),
    Series("PipeFusion", "PipeFusion", "#d6569a", "X"),
)


def draw(rows: list[Row], path: Path) -> None:
    """Draw the rows of all routes; the same rows give the same file.

    Args:
        rows: of `chart`.
        path: what its ending says: ``.svg``, ``.png``, ...
    """
    with plt.rc_context(STYLE):
        routes = [route for route in TITLES if any(row["route"] == route for row in rows)] or ["pipefusion"]
        figure, axes = plt.subplots(len(routes), 1, figsize=(8.4, 5.4 * len(routes) + 0.6), sharex=True, squeeze=False)
        for axis, route in zip(axes[:, 0], routes, strict=True):
            _panel(axis, [row for row in rows if row["route"] == route or row["family"] in METHODS])
            axis.set_title(TITLES.get(route, "PipeFusion of 2 ranks"))
        axes[-1][0].set_xlabel("MB of a request, both ranks, from float32")
        handles = {}
        for axis in axes[:, 0]:
            found, labels = axis.get_legend_handles_labels()
            handles |= dict(zip(labels, found, strict=True))
        figure.legend(handles.values(), handles.keys(), loc="lower center", ncols=5, frameon=False, fontsize=8)
        figure.tight_layout(rect=(0, 0.07, 1, 1))
        figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None, dpi=120)
        plt.close(figure)
    print(f"drawn to {path}")


def decibels(row: Row) -> float:
    """The median error."""
    return 20 * math.log10(row["median"]) if row["median"] else -math.inf


def _panel(axis: Axes, rows: list[Row]) -> None:
    """One route."""
    for row in rows:
        if row["family"] == "uncompressed":
            axis.axvline(row["wire_bytes"] / 1e6, color="#77797f", linestyle=":", label="uncompressed")
    left = [row for row in rows if decibels(row) > SHOWN_ABOVE_DB]
    for series in SERIES:
        mine = [row for row in left if _belongs(row, series)]
        left = [row for row in left if row not in mine]
        if mine:
            _plot(axis, sorted(mine, key=lambda row: row["wire_bytes"]), series)
    axis.set_xscale("log")
    axis.set_xticks(TICKS, [str(tick) for tick in TICKS])
    axis.set_xlim(right=1.6 * max(row["wire_bytes"] for row in rows) / 1e6)
    axis.tick_params(labelbottom=True)
    axis.minorticks_off()
    axis.set_ylabel("error of the pictures, dB")
    axis.grid(color="#e8e8e8", linewidth=0.5)
    axis.set_axisbelow(True)


def _belongs(row: Row, series: Series) -> bool:
    """Whether a row is a point of the series; `transform` at one bit is a codec by itself and a rate of its line."""
    name = row["variant"].removesuffix(", order auto")
    if series.only:
        return name in series.only and (row["family"] == series.family or row["variant"] == series.family)
    return bool(row["family"] == series.family)


def _plot(axis: Axes, rows: list[Row], series: Series) -> None:
    """Points with their names."""
    sizes = [row["wire_bytes"] / 1e6 for row in rows]
    errors = [decibels(row) for row in rows]
    axis.plot(
        sizes,
        errors,
        linestyle=series.line,
        marker=series.marker,
        color=series.colour,
        label=series.label,
        markersize=5,
        linewidth=1,
    )
    if series.at is None:
        return
    side = "left" if series.at[0] > 0 else "right"
    for row, x, y in zip(rows, sizes, errors, strict=True):
        axis.annotate(
            _short(row["variant"]),
            (x, y),
            xytext=series.at,
            textcoords="offset points",
            ha=side,
            color=series.colour,
            fontsize=7,
        )


def _short(variant: str) -> str:
    """A row's name without what the legend says."""
    for start in ("preset ", "transform:", "target ", "DistriFusion, ", "PipeFusion, ", "binary, no "):
        variant = variant.removeprefix(start)
    for end in (", raw keyframe", ", int4 keyframe"):
        variant = variant.removesuffix(end)
    return variant.replace("nmse_db=", "")
