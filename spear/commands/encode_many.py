"""``spear encode`` over folders and manifests: whole corpora in batches, in parts that are written once, as npz, Parquet or Lhotse Shar."""

from __future__ import annotations

import itertools
import logging
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from lhotse.cut import Cut, MonoCut
from lhotse.utils import fastcopy
from numpy.typing import NDArray

from spear.commands.encode import LONG_S, check_layer, select
from spear.data.audio import DOWNMIX, load_audio, open_recording
from spear.data.corpora import SourceItem
from spear.data.sources import AUDIO_SUFFIXES, CutsSource
from spear.errors import ConfigError, DataError
from spear.export.encoder import AudioEncoder, load_encoder
from spear.export.long_audio import WINDOW_S
from spear.export.source import fingerprint_source, read_source
from spear.files import check_names, make_folder, sha256_json, write_atomic, writing
from spear.progress import Meter
from spear.stages.artifact import Artifact
from spear.types import EncoderOutput

logger = logging.getLogger(__name__)
Array = NDArray[np.float32]
MANIFESTS = (".jsonl", ".jsonl.gz")
Layer = Literal["last", "all"] | int


@dataclass(frozen=True, kw_only=True, slots=True)
class BulkOptions:
    """How a corpus is encoded. layer: see `encode_files`."""

    layer: Layer = "last"
    form: str = "npz"
    """One of FORMATS."""
    batch_s: float = 120.0
    """Seconds of audio that go through the encoder together, padding counted."""
    part_size: int = 1000
    """Cuts per part; a part is written whole or not at all."""
    window_s: float = WINDOW_S
    """Seconds of a window, for recordings of more than a minute."""
    device: str = "auto"
    """``auto``: CUDA where there is a GPU."""


def encode_many(export: str | Path, inputs: Sequence[Path], out: Path, options: BulkOptions) -> None:
    """Encode every file below folders, every cut of manifests, and single files, into the artifact `out`.

    A part holds neighbours of the sorted list of inputs and depends on nothing else, so that a killed run is continued part by part and ends
    with the same parts. Within a part, cuts of like durations go through the encoder together: the last frames of the shorter ones see
    padding, as in any padded batch (`AudioEncoder.forward`).

    Raises:
        ConfigError: layer, format or a package. DataError: an input is missing, cannot be read, or two have one id. CheckpointError: no encoder.
        ArtifactError: `out` was made from other inputs.
    """
    if options.form not in FORMATS:
        raise ConfigError(f"`format` must be one of {', '.join(FORMATS)}, but is {options.form!r}")
    write = FORMATS[options.form]
    if options.form == "parquet":
        _arrow()
    cuts = sorted(find_cuts(inputs), key=lambda cut: str(cut.id))
    _check_ids(cuts)
    settings = {
        "layer": options.layer,
        "format": options.form,
        "part_size": options.part_size,
        "batch_s": options.batch_s,
        "window_s": options.window_s,
    }
    listed = sha256_json([[cut.id, round(cut.start, 6), round(cut.duration, 6), *_place(cut)] for cut in cuts])
    identity = {"cuts": listed, "encoder": fingerprint_source(read_source(export))}
    artifact = Artifact(out, kind="encode", config=settings, inputs=identity)
    if artifact.is_done():
        return
    device = options.device if options.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    encoder = load_encoder(export, device)
    check_layer(encoder, options.layer, export)
    parts = [cuts[i : i + options.part_size] for i in range(0, len(cuts), options.part_size)]
    with artifact.making() as record, Meter("encode", len(cuts), unit="cuts") as meter:
        for number, part in enumerate(parts):
            mark = out / ".done" / f"{number:06d}"
            if not mark.exists():
                write(out, number, part, encode_part(encoder, part, options), encoder)
                make_folder(mark.parent)
                write_atomic(mark, lambda _: None)
            meter.advance(len(part), audio_s=sum(cut.duration for cut in part))
        record.counts.update(cuts=len(cuts), parts=len(parts))
        record.audio_s = sum(cut.duration for cut in cuts)


def find_cuts(inputs: Sequence[Path]) -> list[MonoCut]:
    """Cuts of manifests, and of the audio files that are given or lie below folders; a file's id is its path from the folder, without suffix.

    Raises:
        DataError: an input is missing, cannot be read, or holds nothing.
    """
    found: list[MonoCut] = []
    for path in inputs:
        if path.is_dir():
            files = sorted(file for file in path.rglob("*") if file.suffix.lower() in AUDIO_SUFFIXES and not file.name.startswith("."))
            found += [_whole(file, file.relative_to(path).with_suffix("").as_posix()) for file in files]
        elif path.name.endswith(MANIFESTS):
            found += [_one_channel(item) for item in CutsSource(train=str(path)).files("train")]
        else:
            found.append(_whole(path, path.stem))
    if not found:
        raise DataError(f"{', '.join(map(str, inputs))} must hold audio files or cuts, but hold none", cause="missing_file")
    return found


def _whole(file: Path, name: str) -> MonoCut:
    check_names([str(file)])
    recording = open_recording(file, name)
    cut = MonoCut(name, 0.0, recording.duration, 0, supervisions=[], recording=recording)
    if recording.num_channels > 1:
        cut.custom = {DOWNMIX: list(range(recording.num_channels))}
    return cut


def _one_channel(item: SourceItem) -> MonoCut:
    """Several channels are averaged when the audio is read, as those of files are."""
    if item.cut is None:
        raise DataError(item.message, cause=item.cause)
    if isinstance(item.cut, MonoCut):
        return item.cut
    channels = sorted(item.cut.channel)
    custom = {**(item.cut.custom or {}), DOWNMIX: channels}
    cut = item.cut
    parts = [fastcopy(part, channel=channels[0]) for part in cut.supervisions]
    return MonoCut(cut.id, cut.start, cut.duration, channels[0], supervisions=parts, recording=cut.recording, custom=custom)


def _place(cut: MonoCut) -> list[Any]:
    """Where the audio lies, and its bytes where that is a file: other audio under the same name is another input."""
    source = Path(_source(cut))
    return [str(source), source.stat().st_size if source.is_file() else None]


def _check_ids(cuts: Sequence[Cut]) -> None:
    twice = next((b.id for a, b in itertools.pairwise(cuts) if a.id == b.id), None)
    if twice is not None:
        raise DataError(f"the id {twice!r} must be unique, but two inputs have it", cause="duplicate_id")


def encode_part(encoder: AudioEncoder, cuts: Sequence[MonoCut], options: BulkOptions) -> dict[str, Array]:
    """Id -> features (T, D), or (L, T, D) for all layers, of the cuts of a part."""
    found: dict[str, Array] = {}
    for batch in _batches(cuts, options.batch_s):
        rows = [torch.from_numpy(load_audio(cut, encoder.sample_rate)) for cut in batch]
        if len(rows) == 1 and options.window_s and len(rows[0]) > LONG_S * encoder.sample_rate:
            pieces = [select(piece, options.layer) for piece in encoder.iter_long(rows[0], window_s=options.window_s)]
            found[batch[0].id] = np.concatenate(pieces, axis=-2)
            continue
        lens = torch.tensor([len(row) for row in rows])
        with torch.inference_mode():
            output = encoder(torch.nn.utils.rnn.pad_sequence(rows, batch_first=True), lens)
        for i, (cut, length) in enumerate(zip(batch, output.lens.tolist())):
            states = tuple(state[i : i + 1, :length].cpu() for state in output.hidden_states)
            found[cut.id] = select(EncoderOutput(output.features[i : i + 1, :length].cpu(), output.lens[i : i + 1].cpu(), states), options.layer)
    return found


def _batches(cuts: Sequence[MonoCut], batch_s: float) -> Iterator[list[MonoCut]]:
    """Cuts of like durations together; a cut of more than a minute alone."""
    batch: list[MonoCut] = []
    for cut in sorted(cuts, key=lambda cut: (cut.duration, cut.id)):
        if batch and ((len(batch) + 1) * cut.duration > batch_s or cut.duration > LONG_S):
            yield batch
            batch = []
        batch.append(cut)
    if batch:
        yield batch


def _write_npz(out: Path, number: int, cuts: Sequence[MonoCut], features: dict[str, Array], encoder: AudioEncoder) -> None:
    """One file per cut, named by its id, with the keys that `encode_files` writes."""
    del number
    for cut in cuts:
        facts = {"frame_rate_hz": encoder.frame_rate_hz, "first_frame_s": encoder.first_frame_s, "source": np.str_(_source(cut))}
        path = out / f"{cut.id}.npz"
        make_folder(path.parent)

        def write(temporary: Path, values: Array = features[cut.id], facts: dict[str, Any] = facts) -> None:
            with temporary.open("wb") as file:
                np.savez(file, features=values, **facts)

        write_atomic(path, write)


def _write_parquet(out: Path, number: int, cuts: Sequence[MonoCut], features: dict[str, Array], encoder: AudioEncoder) -> None:
    """``part-000000.parquet``: a row per cut with id, source, shape, rate, and the features as a flat list in the order of the shape."""
    pa, pq = _arrow()
    rows = {
        "id": [cut.id for cut in cuts],
        "source": [_source(cut) for cut in cuts],
        "shape": [list(features[cut.id].shape) for cut in cuts],
        "frame_rate_hz": [encoder.frame_rate_hz] * len(cuts),
        "first_frame_s": [encoder.first_frame_s] * len(cuts),
        "features": pa.array([features[cut.id].ravel() for cut in cuts], type=pa.list_(pa.float32())),
    }
    write_atomic(out / f"part-{number:06d}.parquet", lambda temporary: pq.write_table(pa.table(rows), temporary))


def _write_shar(out: Path, number: int, cuts: Sequence[MonoCut], features: dict[str, Array], encoder: AudioEncoder) -> None:
    """``shar/cuts.000000.jsonl.gz`` and ``student.000000.tar`` for ``CutSet.from_shar``; a cut's field ``student`` is an array over time."""
    from lhotse.shar import SharWriter

    if any(value.ndim != 2 for value in features.values()):
        raise ConfigError("`layer` must be a number or last for Shar, whose arrays have one row per frame, but is all")
    with tempfile.TemporaryDirectory(dir=out) as place, writing(out):
        with SharWriter(place, {"student": "numpy"}, shard_size=None, shard_suffix=f".{number:06d}", warn_unused_fields=False) as writer:
            for cut in cuts:
                plain = replace(cut, recording=None)
                writer.write(plain.attach_tensor("student", features[cut.id], frame_shift=1 / encoder.frame_rate_hz, temporal_dim=0))
        make_folder(out / "shar")
        for file in sorted(Path(place).iterdir()):
            file.replace(out / "shar" / file.name)


FORMATS: dict[str, Callable[[Path, int, Sequence[MonoCut], dict[str, Array], AudioEncoder], None]] = {
    "npz": _write_npz,
    "parquet": _write_parquet,
    "shar": _write_shar,
}
"""How a part is written."""


def _source(cut: MonoCut) -> str:
    source = cut.recording.sources[0]
    return str(source.source) if source.type in ("file", "url") else str(cut.recording.id)


def _arrow() -> tuple[Any, Any]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise ConfigError("`format` parquet needs the package pyarrow: install the extra [parquet], or take npz or shar") from error
    return pyarrow, pyarrow.parquet
