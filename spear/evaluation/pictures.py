"""Pictures of the report that answer one question each: which layer, which teacher, confused with what, how robust."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import matplotlib as mpl
import numpy as np
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from numpy.typing import NDArray

from spear.evaluation.figures import COLOURS, FAINT, INK, SERIES, STYLE, WIDTH, to_svg

DEEPEST = 0.6
"""Opacity of the fullest cell with a number in it, so that the number can be read in both themes."""


class LayerRow(NamedTuple):
    """One row of the map of layers: its name, one value per layer (None where there is none), and which direction is better."""

    name: str
    values: list[float | None]
    higher_is_better: bool


def layer_map(title: str, layers: Sequence[str], rows: Sequence[LayerRow], name: str) -> str:
    """Values of every layer, deeper in colour the better they are among those of their row; the best is framed."""
    shares = np.full((len(rows), len(layers)), np.nan)
    best = []
    for i, row in enumerate(rows):
        values = np.array([np.nan if x is None else x for x in row.values])
        signed = values if row.higher_is_better else -values
        span = np.nanmax(signed) - np.nanmin(signed)
        shares[i] = (signed - np.nanmin(signed)) / span if span > 0 else np.where(np.isnan(signed), np.nan, 1.0)
        best.append(int(np.nanargmax(signed)))
    texts = [["" if x is None else _short(x) for x in row.values] for row in rows]
    labels = [f"{row.name} {'↑' if row.higher_is_better else '↓'}" for row in rows]
    alt = f"{title}: " + "; ".join(f"{row.name} is best at {layers[b]} with {row.values[b]:.3f}" for row, b in zip(rows, best))
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(max(WIDTH, 1.6 + 0.7 * len(layers)), 0.9 + 0.36 * len(rows)), layout="constrained")
        axes = figure.add_subplot()
        numbered(axes, shares, texts, labels, [layer.replace("layer ", "").replace(" ", "\n") for layer in layers], COLOURS["student"])
        for i, place in enumerate(best):
            axes.add_patch(mpl.patches.Rectangle((place - 0.46, i - 0.44), 0.92, 0.88, fill=False, edgecolor=INK, linewidth=1.4))
        axes.set_title(title)
        return to_svg(figure, name, alt)


def cka_map(title: str, layers: Sequence[str], by_teacher: Mapping[str, Mapping[str, float]], name: str) -> str:
    """Similarity of every layer with every teacher, 0 to 1.

    Args:
        by_teacher: teacher -> layer -> value.
    """
    values = np.array([[found[layer] for layer in layers] for found in by_teacher.values()])
    texts = [[f"{x:.2f}" for x in row] for row in values]
    alt = f"{title}: " + "; ".join(
        f"{teacher} " + ", ".join(f"{layer} {found[layer]:.2f}" for layer in layers) for teacher, found in by_teacher.items()
    )
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(max(WIDTH, 1.6 + 0.7 * len(layers)), 0.95 + 0.36 * len(values)), layout="constrained")
        axes = figure.add_subplot()
        numbered(axes, values, texts, list(by_teacher), [layer.replace("layer ", "").replace(" ", "\n") for layer in layers], COLOURS["teacher"])
        axes.set_title(title)
        return to_svg(figure, name, alt)


def numbered(
    axes: Any, shares: NDArray[np.float64], texts: Sequence[Sequence[str]], rows: Sequence[str], columns: Sequence[str], colour: str
) -> None:
    """A grid of numbers on cells whose depth of colour is a share between 0 and 1; NaN leaves a cell empty."""
    for i, row in enumerate(shares):
        for j, share in enumerate(row):
            if not np.isnan(share):
                patch = mpl.patches.Rectangle(
                    (j - 0.46, i - 0.44), 0.92, 0.88, facecolor=colour, alpha=0.04 + (DEEPEST - 0.04) * share, edgecolor="none"
                )
                axes.add_patch(patch)
            axes.text(j, i, texts[i][j], ha="center", va="center", fontsize=9.5)
    axes.set_xlim(-0.5, len(columns) - 0.5)
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.set_xticks(range(len(columns)), columns)
    axes.set_yticks(range(len(rows)), rows)
    axes.tick_params(length=0)
    axes.tick_params(axis="x", labelsize=8.5)
    for spine in axes.spines.values():
        spine.set_visible(False)


def _short(value: float) -> str:
    return f"{value:.3f}".lstrip("0") if 0 <= value < 1 else f"{value:.3g}"


class Confusion(NamedTuple):
    """classes; counts (K, K): rows are what it was, columns what the model said."""

    classes: list[str]
    counts: NDArray[np.int64]

    @classmethod
    def of(cls, record: Mapping[str, Any]) -> Confusion | None:
        """The counts in a score; None where it has none."""
        found = record.get("confusion")
        return None if found is None else cls(found["classes"], np.array([[int(x) for x in row.split()] for row in found["rows"]]))

    def shares(self) -> NDArray[np.float64]:
        """Rows that sum to 1, or to 0 where a class does not occur."""
        totals = self.counts.sum(axis=1, keepdims=True)
        return np.asarray(self.counts / np.maximum(totals, 1), np.float64)

    def worst(self, count: int = 6) -> list[str]:
        """The pairs that are confused most often, in words."""
        wrong = self.counts - np.diag(np.diag(self.counts))
        places = [divmod(int(i), len(self.classes)) for i in np.argsort(-wrong, axis=None, kind="stable")[:count]]
        return [f"{self.classes[a]} as {self.classes[b]} ({self.shares()[a, b]:.0%})" for a, b in places if wrong[a, b] > 0]


def confusion_map(title: str, found: Confusion, name: str) -> str:
    """Shares of the answers to every class, one row per class; the diagonal is right."""
    shares, size = found.shares(), len(found.classes)
    used = found.counts.sum(axis=1) > 0
    pixels = np.zeros((*shares.shape, 4))
    pixels[..., :3] = to_rgb(COLOURS["student"])
    pixels[..., 3] = np.sqrt(shares)
    right = np.arange(size)
    pixels[right, right, :3] = to_rgb(COLOURS["teacher"])
    wide = size > 20
    with mpl.rc_context({**STYLE, "font.size": 8 if wide else 9.5}):
        side = max(3.2, 0.135 * size) if wide else 1.2 + 0.3 * size
        figure = Figure(figsize=(side + 0.6, side + 0.2), layout="constrained")
        axes = figure.add_subplot()
        axes.imshow(pixels, interpolation="nearest")
        axes.set_xticks(right, found.classes, rotation=90)
        axes.set_yticks(right, found.classes)
        axes.tick_params(length=0, pad=2)
        if wide:
            axes.tick_params(labelsize=7)
        axes.set_xlabel("heard as")
        axes.set_ylabel("was")
        axes.set_title(title)
        for edge in np.arange(-0.5, size, 5 if wide else 1):
            axes.axhline(edge, color=FAINT, linewidth=0.4)
            axes.axvline(edge, color=FAINT, linewidth=0.4)
        for spine in axes.spines.values():
            spine.set_visible(False)
        mean = float(np.diag(shares)[used].mean()) if used.any() else 0.0
        worst = ", ".join(found.worst(4)) or "nothing"
        return to_svg(figure, name, f"{title}, confusions of {size} classes: {mean:.0%} right on average over classes; most often confused: {worst}")


def retrieval_curves(title: str, by_model: Mapping[str, Mapping[str, Any]], clips: int, name: str) -> str:
    """Share of clips that find themselves, over the level of noise and over speed, one line per model.

    Args:
        by_model: label -> {kind, noise: {dB: share}, speed: {factor: share}}.
    """
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(6.4, 3.1), layout="constrained")
        axes = figure.subplots(1, 2, sharey=True)
        for i, (label, found) in enumerate(by_model.items()):
            student = found["kind"] == "student"
            colour = (
                COLOURS["student"] if student else COLOURS["logmel"] if found["kind"] == "logmel" else (SERIES[0], SERIES[2], SERIES[3])[(i - 1) % 3]
            )
            style: dict[str, Any] = {
                "color": colour,
                "linewidth": 2.4 if student else 1.4,
                "marker": "o",
                "markersize": 4,
                "zorder": 4 if student else 3,
            }
            noise = sorted(((float(x), y) for x, y in found["noise"].items()), reverse=True)
            speed = sorted((float(x), y) for x, y in found["speed"].items())
            axes[0].plot([x for x, _ in noise], [y for _, y in noise], label=label, linestyle="-" if student else "--", **style)
            axes[1].plot([x for x, _ in speed], [y for _, y in speed], linestyle="-" if student else "--", **style)
        axes[0].invert_xaxis()
        axes[0].set_xlabel("signal-to-noise ratio, dB")
        axes[1].set_xlabel("speed")
        axes[0].set_ylabel("finds itself")
        for part in axes:
            part.set_ylim(-0.03, 1.05)
            part.grid(True, axis="y")
            part.axhline(1 / clips, color=INK, linewidth=1, linestyle=(0, (2, 3)))
        figure.suptitle(title, x=0.01, ha="left", fontsize=11, color=INK)
        figure.legend(loc="outside lower center", ncols=2)
        alt = f"{title}, {clips} clips: " + "; ".join(
            f"{label} {', '.join(f'{y:.0%} at {x} dB' for x, y in found['noise'].items())}" for label, found in by_model.items()
        )
        return to_svg(figure, name, alt)
