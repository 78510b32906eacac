"""One look for every figure: legible at column width, in colours that the colour-blind can tell apart, the paper's values marked.

The palette is Okabe and Ito's. A reader must see the point without the text: a figure's title states its finding or question, axes carry
units, our values are filled marks or lines, the paper's are black diamonds.
"""

from __future__ import annotations

import contextlib
import math
import textwrap
from collections.abc import Iterator, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast, get_args

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Text

BLUE, ORANGE, GREEN, RED, PURPLE, SKY, YELLOW, GREY = (
    "#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#F0E442", "#7F7F7F",
)  # fmt: skip

#: Distinct even when printed in grey: colour, marker and dash change together.
SERIES = (
    (BLUE, "o", "-"),
    (RED, "s", "--"),
    (GREEN, "^", "-."),
    (ORANGE, "D", ":"),
    (PURPLE, "v", "-"),
    (SKY, "P", "--"),
    (GREY, "X", "-."),
)

#: One colour per case of Table 6, in every figure.
CASE_COLOURS = {"prfaas_pd": BLUE, "homogeneous_pd": GREY, "naive_heterogeneous_pd": ORANGE}
CASE_NAMES = {
    "prfaas_pd": "PrfaaS-PD",
    "homogeneous_pd": "homogeneous PD",
    "naive_heterogeneous_pd": "naive heterogeneous PD",
}

#: How a value that the paper prints is drawn.
PAPER: dict[str, Any] = {
    "color": "black",
    "marker": "D",
    "linestyle": "none",
    "markersize": 5.5,
    "zorder": 5,
    "label": "paper",
}

#: Of the parts of a stacked bar, so that they differ in grey too.
HATCHES = ("", "////", "....", "xxxx", "----", "\\\\\\\\", "oo", "++++", "||||")

WIDTH_IN, HEIGHT_IN = 6.4, 3.6

_SETTINGS: dict[str, Any] = {
    "figure.dpi": 150, "savefig.dpi": 150, "savefig.bbox": "tight", "font.size": 10, "axes.titlesize": 10.5, "axes.titleweight": "bold",
    "axes.titlelocation": "left", "axes.labelsize": 10, "legend.fontsize": 8.5, "legend.frameon": False, "xtick.labelsize": 9,
    "ytick.labelsize": 9, "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.color": "#DDDDDD",
    "grid.linewidth": 0.6, "axes.axisbelow": True, "lines.linewidth": 1.8, "pdf.fonttype": 42, "svg.hashsalt": "repro",
}  # fmt: skip


#: How wide a figure is set: over one column of a paper, where panels stand below each other, or over two.
Column = Literal["single", "double"]
COLUMNS: tuple[Column, ...] = get_args(Column)
SINGLE_IN = 3.35
#: Over two columns; a wider figure would be scaled down in print, and its text with it.
DOUBLE_IN = 7.0
_NARROWEST_IN = 2.2
_SINGLE: dict[str, Any] = {
    "font.size": 8, "axes.titlesize": 8.5, "axes.labelsize": 8, "legend.fontsize": 7, "xtick.labelsize": 7, "ytick.labelsize": 7,
    "lines.linewidth": 1.3, "savefig.bbox": None,
}  # fmt: skip
_column: ContextVar[Column] = ContextVar("column", default="double")


@contextlib.contextmanager
def applied(column: Column = "double") -> Iterator[None]:
    """Draw in this style inside the block."""
    before = _column.set(column)
    try:
        with mpl.rc_context(
            cast(Any, _SETTINGS | (_SINGLE if column == "single" else {}))
        ):  # its keys are typed as literals
            yield
    finally:
        _column.reset(before)


def panels(
    columns: int = 1, rows: int = 1, *, width_in: float = WIDTH_IN, height_in: float = HEIGHT_IN, **options: Any
) -> tuple[Figure, list[Axes]]:
    """A figure with its axes in reading order; made without pyplot, so that drawing keeps no global state.

    It is no wider than two columns of a paper, unless its panels would get narrower than can be read.
    """
    width_in = min(width_in, max(DOUBLE_IN, _NARROWEST_IN * columns))
    if _column.get() == "single":
        each_in = width_in / columns  # what a panel had
        height_in = min(height_in / rows * SINGLE_IN / each_in, 2.6) * rows * columns
        width_in, columns, rows = SINGLE_IN, 1, rows * columns
        options.pop("sharey", None)
        if ratios := options.pop("height_ratios", None):
            options["height_ratios"] = np.repeat(ratios, rows // len(ratios)).tolist()
    figure = Figure(figsize=(width_in, height_in), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(rows, columns, squeeze=False, **options)
    return figure, [axis for row in axes for axis in row]


@dataclass(frozen=True)
class About:
    """What a figure's file says of itself: its title, and the tier and run that it was drawn from."""

    title: str
    source: str


def save(figure: Figure, stem: Path, about: About, *, for_print: bool) -> Path:
    """PNG, with a PDF where it is for print and an SVG where it is for a page; returns the PNG's path.

    Without dates, so that the same record gives the same bytes.
    """
    _wrap(figure)
    if for_print:
        figure.savefig(
            stem.with_suffix(".pdf"), metadata={"CreationDate": None, "Title": about.title, "Subject": about.source}
        )
    else:
        figure.savefig(
            stem.with_suffix(".svg"), metadata={"Date": None, "Title": about.title, "Description": about.source}
        )
    png = stem.with_suffix(".png")
    figure.savefig(png, metadata={"Software": None, "Title": about.title, "Description": about.source})
    return png


def _wrap(figure: Figure) -> None:
    """Break titles and labels that are longer than their axis over several lines; those with breaks of their own stay."""
    figure.draw_without_rendering()
    for axis in figure.axes:
        box = axis.get_window_extent()
        title = [
            text
            for text in axis.get_children()
            if isinstance(text, Text) and text.get_text() == axis.get_title(loc="left")
        ]
        for text, upright in (*((one, False) for one in title), (axis.xaxis.label, False), (axis.yaxis.label, True)):
            extent, words = text.get_window_extent(), text.get_text()
            long, room = (extent.height, box.height) if upright else (extent.width, box.width)
            if long > 1.1 * room > 0 and "\n" not in words:
                lines = math.ceil(long / (1.1 * room))
                text.set_text(
                    "\n".join(textwrap.wrap(words, math.ceil(len(words) / lines) + 4, break_long_words=False))
                )


_SCALES: dict[str, tuple[tuple[float, str], ...]] = {
    "bit/s": ((1e12, "Tbps"), (1e9, "Gbps"), (1e6, "Mbps"), (1e3, "kbps")),
    "bytes": ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")),
    "s": ((1.0, "s"), (1e-3, "ms"), (1e-6, "µs")),
}
_KEY_UNITS = {"bps": "bit/s", "bytes": "bytes", "s": "s", "tokens": "tokens", "usd": "USD"}


def scaled(unit: str, largest: float) -> tuple[float, str]:
    """The factor and name of the unit in which an axis reads well up to `largest`."""
    for factor, name in _SCALES.get(unit, ()):
        if largest >= factor:
            return factor, name
    return 1.0, unit


def scaled_key(key: str, values: pd.Series) -> tuple[float, str]:
    """`scaled` for values of a key of the configuration, whose last word is its unit."""
    unit = _KEY_UNITS.get(key.rpartition("_")[2], "")
    return scaled(unit, float(values.abs().max()))


def stack(axis: Axes, at: np.ndarray, parts: Sequence[tuple[str, str, np.ndarray]]) -> np.ndarray:
    """Lying bars at `at`, each made of parts (name, colour, lengths) one after the other; returns where the bars end."""
    end = np.zeros(len(at))
    for (name, colour, lengths), hatch in zip(parts, HATCHES, strict=False):
        axis.barh(
            at, lengths, left=end, color=colour, label=name, height=0.7, hatch=hatch, edgecolor="white", linewidth=0.4
        )
        end = end + lengths
    return end


def tokens_axis(axis: Axes) -> None:
    """A logarithmic length axis labelled 1K, 8K, 32K, 128K."""
    axis.set_xscale("log", base=2)
    axis.set_xticks([1024, 8192, 32768, 131072], ["1K", "8K", "32K", "128K"])
    axis.minorticks_off()
    axis.set_xlabel("input length (tokens)")
