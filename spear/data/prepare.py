"""From a cut of any kind to checked 16 kHz mono cuts of a bounded length."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

import numpy as np
from lhotse import SupervisionSegment
from lhotse.cut import Cut, MonoCut
from lhotse.supervision import AlignmentItem
from lhotse.utils import compute_num_samples, fastcopy

from spear.data.audio import DOWNMIX, TOLERANCE_S, Audio, audio_path, load_audio, open_recording
from spear.data.corpora import CorpusConfig, ManifestsConfig, SourceItem
from spear.data.fbank import SAMPLE_RATE
from spear.errors import DataError

FULL_SCALE, TOO_LOUD = 1.0, 2.0
"""Largest absolute sample of a sound file, and the one above which the samples are on another scale than [-1, 1]."""


@dataclass(slots=True)
class Prepared:
    """What became of one item of a source."""

    cuts: list[MonoCut] = field(default_factory=list)
    failures: list[dict[str, str]] = field(default_factory=list)
    """id, path, cause and message of each cut that cannot be used."""
    skipped: Counter[str] = field(default_factory=Counter)
    """Reason -> cuts left out on purpose: too_short, too_long, excluded."""
    silent: int = 0
    """Cuts without any sound; they are kept."""
    clipped: int = 0
    """Cuts with samples beyond full scale, which 16-bit FLAC in shards clips; they are kept."""


def prepare(item: SourceItem, corpus: CorpusConfig, config: ManifestsConfig) -> Prepared:
    """Turn one item into cuts; a pure function of its arguments and the audio on the disk.

    `ManifestsConfig.exclude` leaves out whole items by their ids and windows of long ones by theirs.

    Raises:
        DataError: the cut's id cannot name a file of a shard.
    """
    result = Prepared()
    if item.id in config.exclude:
        result.skipped["excluded"] += 1
        return result
    if item.cut is None:
        result.failures.append(_failure(item.id, item.origin, item.cause, item.message))
        return result
    check_id(item.id, item.origin)
    low, high = corpus.limits_s(config)
    cut = to_mono(item.cut, corpus)
    if cut.duration < item.cut.duration - TOLERANCE_S:
        end = item.cut.recording.duration
        message = f"cut {item.id} ({item.origin}): must reach to {item.cut.end:g} s, but its recording ends at {end:g} s"
        result.failures.append(_failure(item.id, item.origin, "length_mismatch", message))
        return result
    if cut.duration > high + 1e-6 and config.long == "skip":
        result.skipped["too_long"] += 1
        return result
    if cut.duration <= 0:
        result.failures.append(_failure(item.id, item.origin, "empty", f"cut {item.id} ({item.origin}) holds no audio"))
        return result
    if cut.duration < low - 1e-6:
        result.skipped["too_short"] += 1
        return result
    for window in split_long(cut, high):
        if window is not cut and window.id in config.exclude:
            result.skipped["excluded"] += 1
            continue
        try:
            peak = _check(window, config)
        except DataError as error:
            result.failures.append(_failure(window.id, item.origin, error.cause, str(error)))
            continue
        if peak is not None:
            result.silent += peak < config.silence_peak
            result.clipped += peak > FULL_SCALE
        result.cuts.append(window)
    return result


def check_id(cut_id: str, origin: str) -> None:
    """Refuse ids that cannot be a member's name in a tar file.

    Raises:
        DataError: the id is no text, is empty, absolute, has empty or dotted parts, or holds a control character.
    """
    if not isinstance(cut_id, str):  # JSON has numbers too
        raise DataError(f"a cut's id must be text, but is {cut_id!r} ({origin})", cause="id")
    clean = cut_id and str(PurePosixPath(cut_id)) == cut_id and not cut_id.startswith("/") and ".." not in PurePosixPath(cut_id).parts
    if not clean or cut_id == "." or not cut_id.isprintable():
        raise DataError(f"a cut's id must be a plain relative name without control characters, but is {cut_id!r} ({origin})", cause="id")


def to_mono(cut: Cut, corpus: CorpusConfig) -> MonoCut:
    """A 16 kHz MonoCut of `cut` with the corpus's name and domain; Lhotse resamples when the audio is read.

    Several channels are averaged when the audio is read through `load_audio` (custom field ``downmix``). All other custom
    fields, labels and alignments stay.
    """
    return _to_mono(cut, {"domain": corpus.domain, "corpus": corpus.name})


def load_as_stages(path: Path, sample_rate: int) -> Audio:
    """Samples of a whole audio file as the stages hear it: at 16 kHz first, whatever the rate that is wanted; channels averaged.

    Returns:
        (S,) float32 in [-1, 1] at `sample_rate` Hz.
    Raises:
        DataError: as `spear.data.audio.load_audio`; names the file.
    """
    return load_audio(_to_mono(open_recording(path, path.stem).to_cut(), {}), sample_rate)


def _to_mono(cut: Cut, more: dict[str, str]) -> MonoCut:
    recording = cut.recording if cut.sampling_rate == SAMPLE_RATE else cut.recording.resample(SAMPLE_RATE)
    channels = list(cut.channel) if isinstance(cut.channel, (list, tuple, set)) else [cut.channel]
    custom = {**(cut.custom or {}), **more}
    if len(channels) > 1:
        custom[DOWNMIX] = sorted(channels)
    samples = min(compute_num_samples(cut.duration, SAMPLE_RATE), compute_num_samples(max(recording.duration - cut.start, 0.0), SAMPLE_RATE) + 1)
    return MonoCut(
        id=cut.id,
        start=cut.start,
        duration=samples / SAMPLE_RATE,
        channel=min(channels),
        supervisions=[fastcopy(supervision, channel=min(channels)) for supervision in cut.supervisions],
        recording=recording,
        custom=custom,
    )


def split_long(cut: MonoCut, max_s: float) -> list[MonoCut]:
    """Cut `cut` into equal windows of at most `max_s` seconds, ids ``<id>-w0000`` and so on; a short cut stays as it is.

    A supervision reaches into a window with the part of its alignment that lies there. Its text is rebuilt from its words where it
    was cut and has a word alignment, and dropped where it was cut without one.
    """
    total = compute_num_samples(cut.duration, SAMPLE_RATE)
    windows = math.ceil(total / (max_s * SAMPLE_RATE) - 1e-9)
    if windows <= 1:
        return [cut]
    edges = [total * i // windows for i in range(windows + 1)]
    result = []
    for i, (first, last) in enumerate(itertools.pairwise(edges)):
        start, duration = first / SAMPLE_RATE, (last - first) / SAMPLE_RATE
        window_id = f"{cut.id}-w{i:04d}"
        inside = [part for part in cut.supervisions if _overlap(part, start, duration) > 0]
        parts = [_supervision(part, f"{window_id}-{n}", start, duration) for n, part in enumerate(inside)]
        place = {"id": window_id, "start": round(cut.start + start, 8), "duration": duration}
        result.append(fastcopy(cut, **place, supervisions=parts, custom=dict(cut.custom or {})))
    return result


def _overlap(part: SupervisionSegment | AlignmentItem, start: float, duration: float) -> float:
    return float(min(part.start + part.duration, start + duration) - max(part.start, start))


def _supervision(part: SupervisionSegment, new_id: str, start: float, duration: float) -> SupervisionSegment:
    inside = round(max(part.start, start) - start, 8), round(_overlap(part, start, duration), 8)
    whole = part.start >= start - 1e-6 and part.start + part.duration <= start + duration + 1e-6
    alignment = {
        kind: [
            AlignmentItem(item.symbol, round(max(item.start, start) - start, 8), round(_overlap(item, start, duration), 8), item.score)
            for item in items
            if _overlap(item, start, duration) > 1e-6
        ]
        for kind, items in (part.alignment or {}).items()
    }
    text = part.text
    if not whole and text is not None:
        text = " ".join(item.symbol for item in alignment["word"]) if "word" in alignment else None
    return fastcopy(part, id=new_id, start=inside[0], duration=inside[1], text=text, alignment=alignment or None)


def _check(cut: MonoCut, config: ManifestsConfig) -> float | None:
    """Largest absolute sample, None where only the header is read; raises DataError where the audio is not what the manifest says."""
    if config.check_audio == "full":
        peak = float(np.abs(load_audio(cut)).max())
        if peak > TOO_LOUD:
            message = f"cut {cut.id} ({audio_path(cut)}): samples must be between -1 and 1, but reach {peak:g}: write the file anew on that scale"
            raise DataError(message, cause="too_loud")
        return peak
    for source in cut.recording.sources:
        if source.type == "file":
            found = open_recording(Path(source.source), cut.recording.id)
            if found.duration < cut.end - TOLERANCE_S and all(_keeps_time(part) for part in cut.recording.transforms or []):
                message = f"cut {cut.id} ({audio_path(cut)}): must reach to {cut.end:g} s, but the file ends at {found.duration:g} s"
                raise DataError(message, cause="length_mismatch")
    return None


def _keeps_time(transform: object) -> bool:
    return (transform.get("name") if isinstance(transform, dict) else type(transform).__name__) == "Resample"


def _failure(cut_id: str, path: str, cause: str, message: str) -> dict[str, str]:
    return {"id": cut_id, "path": path, "cause": cause, "message": message}
