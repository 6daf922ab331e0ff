"""A quantizer's card: how well it codes held-out frames and how it uses its entries, as JSON, Markdown and two plots."""

from __future__ import annotations

import io
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from spear.errors import DataError
from spear.files import write_bytes, write_json, write_text
from spear.quantizers.base import Quantizer
from spear.quantizers.mvq import MVQ

CARD, CARD_TEXT = "card.json", "card.md"
USAGE_PLOT, CORRELATION_PLOT = "usage.svg", "correlation.svg"
REFINE_ITERS = (0, 1, 2, 5)
_DIGITS = 6


@torch.no_grad()
def card(quantizer: Quantizer, heldout: Tensor) -> dict[str, Any]:
    """Measure a quantizer on held-out teacher frames (H, D).

    Returns:
        JSON values: sizes and ``bits_per_frame``; ``relative_loss``, the squared error over the squared distance from the mean,
        both in the quantizer's (normalised) domain; per codebook ``active_entries`` and ``perplexity`` (2 to the entropy in bits)
        of the codes; for MVQ also ``loss_by_refine_iters`` and the ``correlation`` matrix (see `MVQ.correlations`).
    Raises:
        DataError: no held-out frames, wrong width, or non-finite values.
    """
    frames = quantizer.normalize(heldout)
    if not len(frames):
        raise DataError("a quantizer card needs held-out frames, but there are 0", cause="empty")
    codes = quantizer.encode(heldout).long().view(-1, quantizer.num_codebooks)
    counts = entry_counts(codes, quantizer.codebook_size)
    found: dict[str, Any] = {
        "type": quantizer.kind,
        "fingerprint": quantizer.fingerprint(),
        "dim": quantizer.dim,
        "num_codebooks": quantizer.num_codebooks,
        "codebook_size": quantizer.codebook_size,
        "bits_per_frame": quantizer.bits_per_frame,
        "normalize": quantizer.normalizer is not None,
        "heldout_frames": len(frames),
        "relative_loss": _relative_loss(quantizer, frames, codes),
        "active_entries": [int(n) for n in (counts > 0).sum(dim=1)],
        "perplexity": [round(math.exp(_entropy(row)), 3) for row in counts],
    }
    if isinstance(quantizer, MVQ):
        found["entries"] = quantizer.entries
        found["loss_by_refine_iters"] = {str(n): _relative_loss(quantizer, frames, quantizer.search(frames, n)) for n in REFINE_ITERS}
        found["correlation"] = [[round(value, _DIGITS) for value in row] for row in quantizer.correlations().tolist()]
    return found


def entry_counts(codes: Tensor, codebook_size: int) -> Tensor:
    """How often each entry occurs, (C, K) int64, in codes (M, C)."""
    return torch.stack([torch.bincount(column, minlength=codebook_size) for column in codes.long().T])


def _entropy(counts: Tensor) -> float:
    """Entropy in nats of the distribution that counts (K,) estimate."""
    shares = counts[counts > 0].double() / counts.sum()
    return float(-(shares * shares.log()).sum())


def _relative_loss(quantizer: Quantizer, frames: Tensor, codes: Tensor) -> float:
    error = (quantizer.reconstruct(codes) - frames).double().square().sum()
    spread = (frames - frames.mean(dim=0)).double().square().sum()
    return round(float(error / (spread + 1e-20)), _DIGITS)


def write_card(folder: Path, found: dict[str, Any], quantizer: Quantizer, heldout: Tensor) -> None:
    """Write ``card.json``, ``card.md`` and the plots into `folder`; the same quantizer and frames give the same bytes.

    Args:
        found: what `card` returned for `quantizer` and `heldout`.
    """
    codes = quantizer.encode(heldout).long().view(-1, quantizer.num_codebooks)
    write_json(folder / CARD, found)
    write_bytes(folder / USAGE_PLOT, _usage_plot(entry_counts(codes, quantizer.codebook_size)))
    if "correlation" in found:
        write_bytes(folder / CORRELATION_PLOT, _correlation_plot(found["correlation"]))
    write_text(folder / CARD_TEXT, _markdown(found))


def _markdown(found: dict[str, Any]) -> str:
    size = found["codebook_size"]
    lines = [
        f"# Quantizer `{found['type']}` {found['fingerprint'][:8]}",
        "",
        f"- frames of {found['dim']} channels{', normalised' if found['normalize'] else ''}",
        f"- {found['num_codebooks']} codebooks of {size} entries, {found['bits_per_frame']:g} bits per frame",
        f"- relative loss {found['relative_loss']:.4f} on {found['heldout_frames']} held-out frames",
    ]
    if "loss_by_refine_iters" in found:
        losses = ", ".join(f"{value:.4f} after {iters}" for iters, value in found["loss_by_refine_iters"].items())
        lines += [f"- by rounds of search: {losses}"]
    if found.get("entries", size) < size:
        lines += [f"- fitted on little data: only {found['entries']} of {size} entries are in use"]
    lines += ["", "| codebook | active entries | perplexity |", "| --- | --- | --- |"]
    rows = zip(found["active_entries"], found["perplexity"])
    lines += [f"| {index} | {active} | {perplexity:.1f} |" for index, (active, perplexity) in enumerate(rows)]
    lines += ["", f"![How often entries are used]({USAGE_PLOT})"]
    if "correlation" in found:
        lines += ["", f"![Correlation of codebooks]({CORRELATION_PLOT})"]
    return "\n".join(lines) + "\n"


def _svg(figure: Any) -> bytes:
    """Bytes of a figure without date, version or random identifiers."""
    from matplotlib import rc_context

    buffer = io.BytesIO()
    with rc_context({"svg.hashsalt": "spear", "svg.fonttype": "none"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": "spear"})
    return buffer.getvalue()


def _usage_plot(counts: Tensor) -> bytes:
    """Share of frames per entry, most used first, one line per codebook, counts (C, K)."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    shares = counts.double().sort(dim=1, descending=True).values / counts.sum(dim=1, keepdim=True)
    ranks = range(1, counts.shape[1] + 1)
    for index, row in enumerate(shares):
        axes.plot(ranks, row.tolist(), linewidth=1, label=f"codebook {index}" if len(shares) <= 8 else None)
    axes.axhline(1 / counts.shape[1], color="black", linewidth=0.8, linestyle=":", label="uniform")
    axes.set(xlabel="entry, most used first", ylabel="share of frames", title="Use of entries on held-out frames")
    axes.legend(fontsize="small")
    return _svg(figure)


def _correlation_plot(matrix: list[list[float]]) -> bytes:
    """Heat map of codebook correlations (C, C)."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5, 4), layout="constrained")
    axes = figure.subplots()
    image = axes.pcolormesh(matrix, vmin=0.0, vmax=1.0, cmap="viridis")
    axes.invert_yaxis()
    axes.set(xlabel="codebook", ylabel="codebook", title="Correlation of codebooks (0: orthogonal)", aspect="equal")
    figure.colorbar(image)
    return _svg(figure)
