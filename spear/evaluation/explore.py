"""A map of clips by what an encoder hears in them: one HTML page that needs nothing but itself."""

from __future__ import annotations

import base64
import io
import logging
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from jinja2 import Environment, StrictUndefined
from numpy.typing import NDArray

from spear.data.fbank import fbank
from spear.errors import ConfigError

logger = logging.getLogger(__name__)

TEMPLATE = Path(__file__).with_name("explore.html.j2")
NEIGHBOURS = 6
MOST_GROUPS = 12
"""Colours of the map; the smallest groups share the last one."""
MIN_SOUND_S = 0.5
MAX_COLUMNS = 400
"""Columns of a spectrogram; longer ones are averaged in groups."""
MOST_BOOKS, SHOWN_CODES, CLEAR = 8, 40, 20
"""Codebooks drawn, codes written out, and the colour that stands for no token."""
FRAME = 400
"""Samples of one log-mel frame; shorter sounds are drawn with silence behind them."""
_Floats = NDArray[np.float32]


class Tokens(NamedTuple):
    """codes (T, C) of what can be heard of a clip, their rate and the centre of the first frame."""

    codes: NDArray[np.int64]
    frame_rate_hz: float
    first_frame_s: float


class Clip(NamedTuple):
    """name: for readers. group: colour on the map. duration_s, embedding (D,): of the whole recording. sound: (S,) what can be heard.

    tokens: of a teacher, where they are to be shown.
    """

    name: str
    group: str
    duration_s: float
    sound: _Floats
    embedding: _Floats
    tokens: Tokens | None = None


def project(embeddings: _Floats, method: str) -> _Floats:
    """Places (N, 2) in [0, 1] of embeddings (N, D), after the mean is taken off and lengths are made one.

    Args:
        method: ``pca`` or ``tsne`` (van der Maaten & Hinton 2008; fewer than 8 clips are placed by PCA).
    Raises:
        ConfigError: another method.
    """
    if method not in ("pca", "tsne"):
        raise ConfigError(f"`method` must be pca or tsne, but is {method!r}")
    points = _directions(embeddings)
    if method == "tsne" and len(points) >= 8:
        from sklearn.manifold import TSNE

        perplexity = min(30.0, (len(points) - 1) / 3)
        places = TSNE(n_components=2, init="random", perplexity=perplexity, random_state=0).fit_transform(points)
    else:
        left, values, _ = np.linalg.svd(points, full_matrices=False)
        places = np.zeros((len(points), 2), np.float32)
        count = min(2, left.shape[1])
        places[:, :count] = left[:, :count] * values[:count]
    low, high = places.min(axis=0), places.max(axis=0)
    span = np.where(high - low > 1e-6, high - low, 1.0)
    scaled: _Floats = ((places - low) / span).astype(np.float32)
    return scaled


def nearest(embeddings: _Floats, count: int = NEIGHBOURS) -> tuple[NDArray[np.int64], _Floats]:
    """Indices (N, K) and cosines (N, K) of the clips nearest to each, nearest first; K = `count`, at most N - 1.

    The mean of all embeddings (N, D) is taken off first, so that what all clips share does not count.
    """
    points = _directions(embeddings)
    cosines = points @ points.T
    np.fill_diagonal(cosines, -np.inf)
    order = np.argsort(-cosines, axis=1, kind="stable")[:, : min(count, len(points) - 1)]
    return order, np.take_along_axis(cosines, order, axis=1)


def _directions(embeddings: _Floats) -> _Floats:
    centred = embeddings - embeddings.mean(axis=0)
    directions: _Floats = centred / np.linalg.norm(centred, axis=1, keepdims=True).clip(min=1e-9)
    return directions


def sound_seconds(durations_s: Sequence[float], sample_rate: int, most_s: float, max_mb: float) -> float:
    """Seconds of each clip that can be heard: `most_s`, or less where the page's sound would exceed `max_mb` (10^6 bytes).

    Raises:
        ConfigError: less than half a second would be left.
    """
    left_s = max_mb * 1e6 / (2 * sample_rate * 4 / 3)  # 16-bit samples, base64
    for index, duration in enumerate(sorted(durations_s)):
        share = left_s / (len(durations_s) - index)
        if min(duration, most_s) > share:
            break
        left_s -= min(duration, most_s)
    else:
        return most_s
    if share < MIN_SOUND_S:
        raise ConfigError(
            f"`max_mb` is {max_mb:g}, which leaves {share:.2g} s of sound for each of {len(durations_s)} clips: raise it, or take fewer"
        )
    logger.warning("clips can be heard for %.1f s instead of %g s, so that the page stays below %g MB of sound", share, most_s, max_mb)
    return share


def render(clips: Sequence[Clip], title: str, encoder: str, method: str, sample_rate: int) -> str:
    """The page as text; `encoder`: its name for readers."""
    embeddings = np.stack([clip.embedding for clip in clips])
    places = project(embeddings, method)
    order, cosines = nearest(embeddings)
    named = [group for group, _ in Counter(clip.group for clip in clips).most_common()]
    groups = named if len(named) <= MOST_GROUPS else [*named[: MOST_GROUPS - 1], "others"]
    facts = [
        {
            "name": clip.name,
            "group": min(named.index(clip.group), len(groups) - 1),
            "seconds": round(clip.duration_s, 2),
            "heard": round(len(clip.sound) / sample_rate, 2),
            "place": [round(float(value), 4) for value in place],
            "near": [[int(index), round(float(cosine), 2)] for index, cosine in zip(row, values)],
            "sound": wave_uri(clip.sound, sample_rate),
            "picture": spectrogram_uri(clip.sound),
            "tokens": "" if clip.tokens is None else tokens_uri(clip.tokens, len(clip.sound) / sample_rate),
            "codes": "" if clip.tokens is None else _first_codes(clip.tokens),
        }
        for clip, place, row, values in zip(clips, places, order, cosines)
    ]
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string(TEMPLATE.read_text(encoding="utf-8"))
    return template.render(title=title, encoder=encoder, method={"pca": "PCA", "tsne": "t-SNE"}[method], groups=groups, clips=facts)


def wave_uri(sound: _Floats, sample_rate: int) -> str:
    """A ``data:`` URI of a WAV with 16-bit samples."""
    import soundfile

    buffer = io.BytesIO()
    soundfile.write(buffer, sound.clip(-1, 1), sample_rate, format="WAV", subtype="PCM_16")
    return _uri("audio/wav", buffer)


def spectrogram_uri(sound: _Floats) -> str:
    """A ``data:`` URI of a PNG: log-mel energies, time to the right, low frequencies at the bottom, the upper 60 dB in colours."""
    from matplotlib import colormaps
    from PIL import Image

    frames = fbank(torch.from_numpy(np.pad(sound, (0, max(FRAME - len(sound), 0)))), 128).numpy()
    if len(frames) > MAX_COLUMNS:
        frames = np.stack([part.mean(axis=0) for part in np.array_split(frames, MAX_COLUMNS)])
    top = float(frames.max())
    floor = top - 6 * np.log(10)  # energies: 60 dB are a factor of 10^6
    bands = np.flipud(frames.clip(floor, top).reshape(-1, 64, 2).mean(axis=2).T)  # 64 rows, high frequencies first
    levels = ((bands - floor) / (top - floor) * 255).round().astype(np.uint8)
    image = Image.fromarray(levels).convert("P")
    image.putpalette((colormaps["magma"](np.arange(256))[:, :3] * 255).astype(np.uint8).tobytes())
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return _uri("image/png", buffer)


def tokens_uri(tokens: Tokens, duration_s: float) -> str:
    """A ``data:`` URI of a PNG as wide as the spectrogram: one row per codebook, equal colours are equal tokens, clear where there are none.

    Args:
        duration_s: of the spectrogram, at the tokens' rate one column a frame.
    """
    from matplotlib import colormaps
    from PIL import Image

    codes = tokens.codes[:, :MOST_BOOKS]
    columns = max(round(duration_s * tokens.frame_rate_hz), 1)
    levels = np.full((codes.shape[1], columns), CLEAR, np.uint8)
    places = np.floor((tokens.first_frame_s + np.arange(len(codes)) / tokens.frame_rate_hz) * tokens.frame_rate_hz).astype(int)
    inside = places < columns
    levels[:, places[inside]] = ((codes[inside] * 37 + 11) % CLEAR).T
    image = Image.fromarray(levels).convert("P")
    image.putpalette((colormaps["tab20"](np.arange(CLEAR))[:, :3] * 255).astype(np.uint8).tobytes() + b"\0\0\0")
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", transparency=CLEAR)
    return _uri("image/png", buffer)


def _first_codes(tokens: Tokens) -> str:
    """The first codes of the first codebook, repeats merged, as text."""
    first = tokens.codes[:, 0]
    kept = first[np.concatenate([[True], first[1:] != first[:-1]])]
    return " ".join(map(str, kept[:SHOWN_CODES])) + (" ..." if len(kept) > SHOWN_CODES else "")


def _uri(kind: str, buffer: io.BytesIO) -> str:
    return f"data:{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"
