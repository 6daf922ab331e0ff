"""Tokenizers side by side on the same frames: one table and one plot."""

from __future__ import annotations

import io
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from spear.evaluation.figures import SERIES, STYLE, label_places
from spear.evaluation.perturb import CHANGES, SAYS
from spear.evaluation.robustness import robustness
from spear.files import write_bytes, write_json, write_text
from spear.quantizers.base import Quantizer, QuantizerConfig
from spear.quantizers.normalize import Normalizer

TABLE_JSON, TABLE_TEXT, PLOT = "compare.json", "compare.md", "compare.svg"
MARKERS = "osD^vP*X<>"


def measure(config: QuantizerConfig, train: Tensor, heldout: Tensor, *, seed: int) -> tuple[Quantizer, dict[str, Any]]:
    """Fit a quantizer and say what it takes and what it loses.

    The relative loss is that of a card, but in one domain for all: channels normalised by the training frames, whatever the quantizer does inside.

    Args:
        train: (M, D) float32. heldout: (H, D) float32.
    Returns:
        the quantizer; ``bits_per_frame``, ``relative_loss``, ``fit_s`` in CPU seconds, ``encode_us`` in CPU microseconds per frame.
    """
    start = time.process_time()
    quantizer = config.fit(train, heldout, seed=seed)
    fit_s = time.process_time() - start
    quantizer.encode(heldout[:32])  # what is made on first use is not the encoder's time
    start = time.process_time()
    codes = quantizer.encode(heldout)
    encode_s = time.process_time() - start
    normalizer = Normalizer.fit(train)
    frames, decoded = normalizer.apply_to(heldout), normalizer.apply_to(quantizer.decode(codes))
    error = (decoded - frames).double().square().sum()
    spread = (frames - frames.mean(dim=0)).double().square().sum()
    return quantizer, {
        "type": quantizer.kind,
        "num_codebooks": quantizer.num_codebooks,
        "codebook_size": quantizer.codebook_size,
        "bits_per_frame": round(quantizer.bits_per_frame, 2),
        "relative_loss": round(float(error / (spread + 1e-20)), 4),
        "fit_s": round(fit_s, 2),
        "encode_us": round(1e6 * encode_s / len(heldout), 1),
    }


def compare(
    configs: Sequence[QuantizerConfig],
    train: Tensor,
    heldout: Tensor,
    clean: Sequence[Tensor],
    changed: dict[str, list[Tensor]],
    *,
    teacher: str,
    frame_rate_hz: float,
    seed: int,
) -> list[dict[str, Any]]:
    """Rows of the table for one teacher, in the order of `configs`; see `measure` and `robustness`.

    Args:
        clean, changed: frames of cuts for `robustness`, which the quantizers have not seen. teacher: how it is called in the table.
    """
    rows = []
    for config in configs:
        quantizer, figures = measure(config, train, heldout, seed=seed)
        rate = round(quantizer.bits_per_frame * frame_rate_hz)
        name = f"{quantizer.kind} {quantizer.num_codebooks} x {quantizer.codebook_size}"
        rows.append({"name": name, "teacher": teacher, **figures, "bits_per_second": rate, **robustness(quantizer, clean, changed)})
    return rows


def markdown(rows: Sequence[dict[str, Any]], shifts: dict[str, dict[str, float]]) -> str:
    """The table of rows, and what it means.

    Args:
        shifts: teacher -> change -> `frame_shift` of its frames.
    """
    changes = [*CHANGES, "other_cut"]
    head = ["tokenizer", "teacher", "bits per frame", "bits/s", "relative loss", "fit, CPU s", "encode, CPU us per frame", *changes]
    lines = ["| " + " | ".join(name.replace("_", " ") for name in head) + " |", "|" + " --- |" * len(head)]
    for row in rows:
        figures = [f"{row['bits_per_frame']:.1f}", row["bits_per_second"], f"{row['relative_loss']:.3f}"]
        figures += [f"{row['fit_s']:.1f}", f"{row['encode_us']:.1f}"]
        errors = [f"{row['token_error'][name]:.2f}" for name in changes]
        lines.append("| " + " | ".join(map(str, [row["name"], row["teacher"], *figures, *errors])) + " |")
    said = ", ".join(f"{name}: {SAYS[name]}" for name in CHANGES)
    lines += ["", f"Last columns: edit distance of tokens without repeats to those of the unchanged audio, relative to their number ({said});", ""]
    lines[-2] += " other cut: to those of another cut, what unrelated audio gives."
    for teacher, values in shifts.items():
        figures = [f"{name} {value:.3f}" for name, value in values.items()]
        lines.append(f"The changes move the frames of {teacher} by {', '.join(figures)} of their variance.")
    return "\n".join(lines) + "\n"


def plot(rows: Sequence[dict[str, Any]]) -> bytes:
    """SVG: left, bits per frame against relative loss; right, the mean edit distance over the changes against relative loss."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    style = {key: value for key, value in STYLE.items() if "color" not in key}
    bits = [math.log2(row["bits_per_frame"]) for row in rows]
    errors = [sum(row["token_error"][name] for name in CHANGES) / len(CHANGES) for row in rows]
    teachers = list(dict.fromkeys(row["teacher"] for row in rows))
    with mpl.rc_context({**style, "svg.hashsalt": "spear"}):
        figure = Figure(figsize=(11, 5), layout="constrained")
        left, right = figure.subplots(1, 2, sharey=True)
        for axes, places in ((left, bits), (right, errors)):
            _dots(axes, rows, places, teachers)
        powers = range(math.floor(min(bits)), math.ceil(max(bits)) + 1)
        left.set_xticks(powers, [f"{2**power:g}" for power in powers])
        left.set(xlabel="bits per frame", ylabel="held-out relative loss", title="What the bits buy")
        right.set(xlabel=f"edit distance after {', '.join(CHANGES)}: mean", title="How much tokens change")
        marks = [left.scatter([], [], color="0.4", marker=MARKERS[i % len(MARKERS)], label=name) for i, name in enumerate(teachers)]
        figure.legend(handles=marks, loc="outside lower center", ncols=len(marks), title="frames of")
        buffer = io.BytesIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": "spear"})
    return buffer.getvalue()


def _dots(axes: Any, rows: Sequence[dict[str, Any]], places: Sequence[float], teachers: Sequence[str]) -> None:
    """A dot and a label per row at (place, relative loss)."""
    kinds = list(dict.fromkeys(row["type"] for row in rows))
    points = [(row["name"], row["teacher"], place, row["relative_loss"]) for row, place in zip(rows, places)]
    for set_limits, values in ((axes.set_xlim, places), (axes.set_ylim, [point[3] for point in points])):
        margin = 0.15 * max(max(values) - min(values), 0.05)
        set_limits(min(values) - margin, max(values) + margin)
    axes.grid(True, linewidth=0.4, alpha=0.5)
    for row, (label, teacher, x, y), (dx, dy) in zip(rows, points, label_places(axes, points)):
        colour, marker = SERIES[kinds.index(row["type"]) % len(SERIES)], MARKERS[teachers.index(teacher) % len(MARKERS)]
        axes.scatter(x, y, color=colour, marker=marker, s=45, zorder=3)
        side = "left" if dx > 0 else "right" if dx < 0 else "center"
        axes.annotate(label, (x, y), xytext=(dx, dy), textcoords="offset points", ha=side, va="center", fontsize=9)


def write_comparison(folder: Path, rows: Sequence[dict[str, Any]], shifts: dict[str, dict[str, float]]) -> str:
    """Write ``compare.json``, ``compare.md`` and ``compare.svg`` into `folder`; returns the table."""
    text = markdown(rows, shifts)
    write_json(folder / TABLE_JSON, {"rows": list(rows), "frame_shift": shifts, "threads": torch.get_num_threads()})
    write_bytes(folder / PLOT, plot(rows))
    write_text(folder / TABLE_TEXT, f"{text}\n![Bits, loss and edit distance]({PLOT})\n")
    return text
