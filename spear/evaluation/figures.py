"""Figures of the report as inline SVG: deterministic, readable on a phone, and drawn in the page's own text colour."""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray

from spear.evaluation.examples import spans

INK, FAINT = "#010203", "#010204"
"""Stand-ins that `to_svg` turns into the page's text colour and its faint line colour."""
COLOURS = {"student": "#d9622b", "untrained": "#b08d6a", "logmel": "#8a9199", "teacher": "#2f7fb8", "tokens": "#5fa9a0", "other": "#8b6fb3"}
SERIES = ("#2f7fb8", "#d9622b", "#4a9d5b", "#a35fb0", "#c2a02e", "#c45062", "#5fa9a0", "#7a7fd0")
STYLE = {
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.size": 10.5,
    "axes.edgecolor": FAINT,
    "axes.labelcolor": INK,
    "axes.titlesize": 11,
    "axes.titlelocation": "left",
    "axes.titlecolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.color": INK,
    "ytick.color": INK,
    "text.color": INK,
    "xtick.major.size": 3,
    "ytick.major.size": 3,
    "legend.frameon": False,
    "legend.fontsize": 9,
    "grid.color": FAINT,
    "grid.linewidth": 0.5,
    "axes.axisbelow": True,
}
WIDTH = 5.0


def to_svg(figure: Figure, name: str, alt: str) -> str:
    """Inline SVG of a figure: no outside references, ids made unique by `name`, `alt` as its accessible name."""
    buffer = io.StringIO()
    with mpl.rc_context({**STYLE, "svg.hashsalt": name}):
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'\s(?:xmlns(?::\w+)?|version)="[^"]*"', "", svg)
    svg = re.sub(r'\bid="', f'id="{name}-', svg)
    svg = re.sub(r'href="#', f'href="#{name}-', svg).replace("url(#", f"url(#{name}-")
    svg = svg.replace(INK, "currentColor").replace(FAINT, "var(--line)")
    svg = re.sub(r'^<svg[^>]*?viewBox="([^"]*)"[^>]*>', rf'<svg role="img" aria-label="{_escaped(alt)}" viewBox="\1">', svg, count=1)
    return svg.strip()


def model_bars(title: str, scores: Mapping[str, Mapping[str, Any]], name: str) -> str:
    """Horizontal bars of all models on one task with their 95 % intervals, and the line of chance.

    Args:
        scores: model -> score record, in the order from top to bottom.
    """
    rows = list(scores.values())
    metric, chance = rows[0]["metric"], rows[0].get("chance")
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, 0.75 + 0.32 * len(rows)), layout="constrained")
        axes = figure.add_subplot()
        y = np.arange(len(rows))[::-1]
        values = np.array([row["value"] for row in rows])
        ends = np.array([row["ci"] for row in rows])
        axes.barh(y, values, color=[COLOURS.get(row["kind"], SERIES[0]) for row in rows], height=0.68)
        axes.hlines(y, ends[:, 0], ends[:, 1], color=INK, linewidth=1)
        right = max(1.0 if rows[0]["higher_is_better"] else 0.0, float(ends.max())) * 1.02
        for position, value, end in zip(y, values, ends[:, 1]):
            axes.text(max(end, value) + 0.012 * right, position, f"{value:.3f}", va="center", fontsize=9)
        if chance is not None and chance <= right:
            axes.axvline(chance, color=INK, linewidth=1, linestyle=(0, (2, 3)))
        axes.set_xlim(0, right * 1.13)
        axes.set_yticks(y, [row["label"] for row in rows])
        axes.tick_params(axis="y", length=0)
        direction = "higher is better" if rows[0]["higher_is_better"] else "lower is better"
        axes.set_xlabel(f"{metric}, {direction}" + (", dotted: chance" if chance is not None and chance <= right else ""))
        axes.set_title(title)
        alt = f"{title}: " + ", ".join(f"{row['label']} {row['value']:.3f}" for row in rows)
        return to_svg(figure, name, alt)


def both_worlds(points: Sequence[tuple[str, str, float, float]], x_title: str, y_title: str, name: str) -> str:
    """One dot per model: its score in one domain against its score in the other.

    Args:
        points: (label, kind, x, y).
    """
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, 4.2), layout="constrained")
        axes = figure.add_subplot()
        axes.grid(True)
        x, y = (np.array([point[i] for point in points]) for i in (2, 3))
        for axis, values in ((axes.set_xlim, x), (axes.set_ylim, y)):
            margin = 0.12 * max(float(values.max() - values.min()), 0.05)
            axis(float(values.min()) - margin, float(values.max()) + margin)
        for _, kind, px, py in points:
            axes.scatter(px, py, s=90 if kind == "student" else 45, color=COLOURS.get(kind, SERIES[0]), zorder=3)
        for (label, _, px, py), (dx, dy) in zip(points, label_places(axes, points)):
            side = "left" if dx > 0 else "right" if dx < 0 else "center"
            axes.annotate(label, (px, py), xytext=(dx, dy), textcoords="offset points", ha=side, va="center", fontsize=9.5)
        axes.set_xlabel(x_title)
        axes.set_ylabel(y_title)
        axes.set_title("Up and to the right: hears both worlds")
        alt = "Scores in two domains: " + "; ".join(f"{label} {px:.3f} and {py:.3f}" for label, _, px, py in points)
        return to_svg(figure, name, alt)


def label_places(axes: Any, points: Sequence[tuple[str, str, float, float]]) -> list[tuple[float, float]]:
    """Offset in points of every label from its dot: the first of eight places that covers the least of other labels, dots and the frame."""
    width, height = 330.0, 235.0  # of the axes in points, near enough for this
    (x0, x1), (y0, y1) = axes.get_xlim(), axes.get_ylim()
    dots = [((px - x0) / (x1 - x0) * width, (py - y0) / (y1 - y0) * height) for _, _, px, py in points]
    taken = [(x - 5, y - 5, x + 5, y + 5) for x, y in dots]
    places: list[tuple[float, float]] = []
    for (label, *_), (x, y) in zip(points, dots):
        length = 5.3 * len(label)
        costs = []
        for dx, dy in ((9, 0), (-9, 0), (0, 13), (0, -13), (7, 11), (-7, 11), (7, -11), (-7, -11)):
            left = x + dx if dx > 0 else x + dx - length if dx < 0 else x - length / 2
            box = (left, y + dy - 6, left + length, y + dy + 6)
            outside = max(-box[0], 0) + max(box[2] - width, 0) + max(-box[1], 0) + max(box[3] - height, 0)
            covered = sum(_overlap(box, other) for other in taken)
            costs.append((covered + 20 * outside, (dx, dy), box))
        _, place, box = min(costs, key=lambda cost: cost[0])
        taken.append(box)
        places.append(place)
    return places


def _overlap(a: tuple[float, ...], b: tuple[float, ...]) -> float:
    """Common area of two boxes (left, bottom, right, top)."""
    return max(min(a[2], b[2]) - max(a[0], b[0]), 0) * max(min(a[3], b[3]) - max(a[1], b[1]), 0)


def curves(title: str, series: Mapping[str, tuple[Sequence[float], Sequence[float], str]], name: str) -> str:
    """Training curves.

    Args:
        series: label -> (steps, values, "train" | "valid"); the two splits of one label share its colour.
    """
    bases = sorted({label.rsplit(", ", 1)[0] for label in series})
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, 3.0 + 0.18 * len(bases)), layout="constrained")
        axes = figure.add_subplot()
        axes.grid(True, axis="y")
        for label, (steps, values, split) in series.items():
            colour = SERIES[bases.index(label.rsplit(", ", 1)[0]) % len(SERIES)]
            if split == "valid":
                axes.plot(steps, values, color=colour, linewidth=1.2, marker="o", markersize=3.5, linestyle="--", label=label)
            else:
                axes.plot(steps, values, color=colour, linewidth=1.3, alpha=0.75, label=label)
        axes.set_xlabel("step")
        axes.set_title(title)
        figure.legend(loc="outside lower center", ncols=2)
        ends = ", ".join(f"{label} from {values[0]:.3f} to {values[-1]:.3f}" for label, (_, values, _) in series.items())
        return to_svg(figure, name, f"{title}: {ends}")


def codebook_bars(teacher: str, perplexity: Sequence[float], usage: Sequence[float], size: int, name: str) -> str:
    """Perplexity of every codebook as a share of its size, with the share of entries in use as a tick."""
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, 2.4), layout="constrained")
        axes = figure.add_subplot()
        x = np.arange(len(perplexity))
        if len(perplexity):
            axes.bar(x, np.asarray(perplexity) / size, color=COLOURS["teacher"], label=f"perplexity / {size}")
        if len(usage):
            axes.scatter(np.arange(len(usage)), usage, color=COLOURS["student"], marker="_", s=120, linewidths=2, label="entries in use")
        axes.set_ylim(0, 1.05)
        axes.set_xlabel("codebook")
        axes.set_xticks(x[:: max(len(x) // 16, 1)])
        axes.set_title(teacher)
        axes.legend(loc="lower right", ncols=2, bbox_to_anchor=(1, 1.0), borderaxespad=0)
        shown = ", ".join(f"{value:.1f}" for value in perplexity)
        return to_svg(figure, name, f"Codebooks of {teacher}: perplexity {shown} of {size} entries")


def example_figure(facts: Mapping[str, Any], arrays: Mapping[str, NDArray[Any]], name: str) -> str:
    """Log-mel with the time mask, phones, and one row of cells per codebook of each teacher, on one time axis."""
    teachers = facts["teachers"]
    segments = [item for item in facts["segments"] if item[1] > item[0]]
    heights = [3.0, *([0.5] if segments else []), *(0.2 + 0.26 * arrays[f"tokens.{teacher}"].shape[1] for teacher in teachers)]
    duration = len(arrays["logmel"]) / 100
    with mpl.rc_context({**STYLE, "font.size": 9}):
        figure = Figure(figsize=(8.6, 0.7 + 0.85 * sum(heights)), layout="constrained")
        rows = figure.subplots(len(heights), 1, sharex=True, height_ratios=heights, squeeze=False)[:, 0]
        logmel = np.asarray(arrays["logmel"], dtype=np.float32).T
        low, high = np.quantile(logmel, [0.05, 0.998])
        rows[0].imshow(
            logmel, origin="lower", aspect="auto", cmap="magma", vmin=low, vmax=max(high, low + 1e-3), extent=(0, duration, 0, len(logmel))
        )
        masked = spans(arrays["mask"])
        for first, last in masked:
            rows[0].axvspan(first / 100, last / 100, facecolor="#e8e8e8", alpha=0.62, edgecolor="none")
        rows[0].set_ylabel("mel bin")
        rows[0].set_xlim(0, duration)
        rest = list(rows[1:])
        if segments:
            _segments(rest.pop(0), segments)
        for axes, (teacher, times) in zip(rest, teachers.items()):
            codes = arrays[f"tokens.{teacher}"]
            half = 0.5 / times["frame_rate_hz"]
            start = times["first_frame_s"] - half
            colours = (codes.T.astype(np.int64) * 37 + 11) % 20
            end = start + len(codes) / times["frame_rate_hz"]
            axes.imshow(
                colours, aspect="auto", cmap="tab20", vmin=0, vmax=19, interpolation="nearest", extent=(start, end, codes.shape[1] - 0.5, -0.5)
            )
            axes.set_yticks([])
            axes.set_ylabel(teacher, rotation=0, ha="right", va="center")
        rows[-1].set_xlabel("seconds")
        rows[-1].set_xlim(0, duration)
        share = float(np.mean(arrays["mask"]))
        alt = (
            f"Log-mel of a {facts['domain']} example of {duration:.1f} s with {len(masked)} masked spans covering {share:.0%}"
            + (f", phones {' '.join(item[2] for item in segments)}" if segments else "")
            + f", and the tokens of {', '.join(teachers) or 'no teacher'}"
        )
        return to_svg(figure, name, alt)


def _segments(axes: Any, segments: Sequence[Sequence[Any]]) -> None:
    """Symbols between thin lines, in two rows where a segment is too short to hold its symbol."""
    crowded = min(end - start for start, end, _ in segments) < 0.016 * axes.get_xlim()[1]
    for i, (start, end, symbol) in enumerate(segments):
        axes.axvline(start, color=FAINT, linewidth=0.8)
        axes.axvline(end, color=FAINT, linewidth=0.8)
        axes.text((start + end) / 2, (0.28 if i % 2 else 0.74) if crowded else 0.5, symbol, ha="center", va="center", fontsize=8.5)
    axes.set_ylim(0, 1)
    axes.set_yticks([])
    axes.set_ylabel("phones", rotation=0, ha="right", va="center")


def _escaped(text: str) -> str:
    return text.replace("&", "&amp;").replace('"', "&quot;").replace("<", "&lt;").replace(">", "&gt;")
