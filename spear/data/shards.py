"""Shards: Lhotse Shar that any Lhotse user can read, with an index of ours that finds every cut's bytes at once."""

from __future__ import annotations

import gzip
import io
import json
import tarfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import soundfile
import torch
from lhotse import AudioSource, Recording
from lhotse.array import Array, TemporalArray
from lhotse.cut import MonoCut
from lhotse.utils import fastcopy
from torch import Tensor

from spear.bounds import at_least
from spear.data.audio import DOWNMIX, Audio, load_audio
from spear.data.fbank import SAMPLE_RATE
from spear.data.open_files import FILES, new_owner
from spear.errors import ArtifactError, ConfigError, DataError
from spear.files import read_json, read_tensors, void, write_atomic, write_bytes, write_json, write_tensors
from spear.types import TokenSpec

Codes = npt.NDArray[Any]
AUDIO_FIELD, FORMAT = "recording", 1


@dataclass(frozen=True, kw_only=True, slots=True)
class ShardsConfig:
    """How audio and tokens are packed."""

    cuts_per_shard: int = 1000
    """Cuts in one set of tar files."""
    length_tolerance_frames: float = 2.0
    """Most token frames that a cut may have more or fewer than its duration, the token rate and the time of the first frame say."""
    min_token_frames: int = 1
    """Fewest token frames of a cut."""

    def __post_init__(self) -> None:
        at_least("cuts_per_shard", self.cuts_per_shard, 1)
        if not 0 <= self.length_tolerance_frames < float("inf"):
            raise ConfigError(f"`length_tolerance_frames` must be 0 or more, but is {self.length_tolerance_frames}")
        at_least("min_token_frames", self.min_token_frames, 1)


class Tokens(Protocol):
    """What shards need of a token store."""

    spec: TokenSpec

    def __getitem__(self, cut_id: str) -> Codes:
        """(T, C) codes of a cut."""
        ...


def token_field(teacher: str) -> str:
    """Name of a teacher's tokens as a field of cuts and of tar files."""
    return f"{teacher}_tokens"


def check_codes(cut_id: str, teacher: str, codes: Codes, seconds: float, spec: TokenSpec, config: ShardsConfig) -> None:
    """Check that codes fit their cut.

    Raises:
        DataError: wrong shape, a code outside 0..K-1, or a length that does not agree with the audio.
    """
    name = f"tokens of {teacher} for cut {cut_id}"
    if codes.ndim != 2 or codes.shape[1] != spec.num_codebooks:
        raise DataError(f"{name}: must have the shape (T, {spec.num_codebooks}), but have {codes.shape}", cause="tokens")
    # a first frame centred at f sees 2 f seconds, and so does the last
    expected = (seconds - 2 * spec.first_frame_s) * spec.frame_rate_hz + 1
    if len(codes) < config.min_token_frames or abs(len(codes) - expected) > config.length_tolerance_frames:
        raise DataError(
            f"{name}: must have {expected:.1f} frames for {seconds:.3f} s at {spec.frame_rate_hz:g} Hz "
            f"(within `length_tolerance_frames` {config.length_tolerance_frames:g}), but have {len(codes)}",
            cause="length_mismatch",
        )
    if int(codes.max()) >= spec.codebook_size or int(codes.min()) < 0:
        raise DataError(f"{name}: must be 0 to {spec.codebook_size - 1}, but reach from {codes.min()} to {codes.max()}", cause="tokens")


def write_shard(folder: Path, number: int, cuts: Sequence[MonoCut], stores: Mapping[str, Tokens], config: ShardsConfig) -> dict[str, Tensor]:
    """Write the tar files and the manifest of one shard; the same cuts give the same bytes.

    Cuts start at 0 and have channel 0, as their audio does. Arrays over time among the custom fields move with them; a recording among them
    is left out where its cut does not start at 0, as Lhotse would read another stretch of it.

    Args:
        folder: of the split. number: of the shard. cuts: its cuts. stores: teacher -> tokens.
    Returns:
        The shard's rows of the index: ids (uint8 text, ends), samples (M,) and per field (M, 2) offset and size.
    Raises:
        DataError: audio or tokens are not as promised.
    """
    audio = _Tar()
    tokens = {teacher: _Tar() for teacher in stores}
    lines: list[bytes] = []
    samples: list[int] = []
    for cut in cuts:
        signal = load_audio(cut)
        seconds = len(signal) / SAMPLE_RATE
        recording = _recording(cut, len(signal))
        audio.add(cut.id, ".flac", flac_bytes(signal), recording.to_dict())
        custom = _moved_to_zero(cut)
        for teacher, store in stores.items():
            codes = np.ascontiguousarray(store[cut.id])
            check_codes(cut.id, teacher, codes, seconds, store.spec, config)
            array = _array(codes, store.spec.frame_rate_hz)
            tokens[teacher].add(cut.id, ".npy", _npy(codes), array.to_dict())
            custom[token_field(teacher)] = array
        parts = [fastcopy(part, channel=0) for part in cut.supervisions]
        place: dict[str, Any] = {"start": 0.0, "duration": seconds, "channel": 0}
        ready = fastcopy(cut, **place, recording=recording, features=None, custom=custom, supervisions=parts)
        lines.append((json.dumps(ready.to_dict(), ensure_ascii=False) + "\n").encode())
        samples.append(len(signal))
    places = {AUDIO_FIELD: audio.write(shard_path(folder, AUDIO_FIELD, number))}
    for teacher, tar in tokens.items():
        places[token_field(teacher)] = tar.write(shard_path(folder, token_field(teacher), number))
    packed = gzip.compress(b"".join(lines), mtime=0)
    write_bytes(folder / f"cuts.{number:06d}.jsonl.gz", packed)
    names = [cut.id.encode() for cut in cuts]
    return {
        "ids": torch.frombuffer(bytearray(b"".join(names)), dtype=torch.uint8),
        "id_ends": torch.tensor([len(name) for name in names]).cumsum(0),
        "samples": torch.tensor(samples),
        **places,
    }


def write_token_shard(folder: Path, number: int, cuts: Sequence[MonoCut], field: str, store: Tokens, config: ShardsConfig) -> None:
    """Write the cuts of one shard and their codes, without audio; of cuts that start at 0, the tar has the bytes that `write_shard` writes.

    Cuts keep their start, which is also that of their codes.

    Raises:
        DataError: a cut has no codes, or they do not fit its duration.
    """
    tar, lines = _Tar(), []
    for cut in cuts:
        codes = np.ascontiguousarray(store[cut.id])
        check_codes(cut.id, field, codes, cut.duration, store.spec, config)
        array = _array(codes, store.spec.frame_rate_hz, float(cut.start))
        tar.add(cut.id, ".npy", _npy(codes), array.to_dict())
        ready = fastcopy(cut, custom={**(cut.custom or {}), field: array})
        lines.append((json.dumps(ready.to_dict(), ensure_ascii=False) + "\n").encode())
    tar.write(shard_path(folder, field, number))
    write_bytes(folder / f"cuts.{number:06d}.jsonl.gz", gzip.compress(b"".join(lines), mtime=0))


def shard_path(folder: Path, field: str, number: int) -> Path:
    """The tar file of one field of one shard."""
    return folder / f"{field}.{number:06d}.tar"


def index_path(folder: Path) -> Path:
    """The index of a split, with a JSON of the same name: beside the folder, as Lhotse takes every file in it for a field."""
    return folder.parent / f"{folder.name}_index.safetensors"


def write_index(folder: Path, parts: Sequence[Mapping[str, Tensor]], *, corpus: str, domain: str, specs: Mapping[str, TokenSpec]) -> None:
    """Join the rows of all shards to the split's index and describe them in its JSON, which is written last."""
    joined: dict[str, list[Tensor]] = {}
    base = 0
    for part in parts:
        for name, value in part.items():
            joined.setdefault(name, []).append(value + base if name == "id_ends" else value)
        base += len(part["ids"])
    tensors = {name: torch.cat(values) for name, values in joined.items()}
    sizes = torch.tensor([len(part["samples"]) for part in parts])
    write_tensors(index_path(folder), {**tensors, "shard_sizes": sizes})
    about = {
        "format": FORMAT,
        "corpus": corpus,
        "domain": domain,
        "sample_rate": SAMPLE_RATE,
        "num_cuts": int(sizes.sum()),
        "num_shards": len(parts),
        "tokens": {teacher: asdict(spec) for teacher, spec in specs.items()},
    }
    write_json(index_path(folder).with_suffix(".json"), about)


@dataclass(slots=True)
class Item:
    """One cut in memory: what mixing and batching work on."""

    id: str
    domain: str
    audio: Audio
    """(S,) float32 at 16 kHz."""
    tokens: dict[str, Codes]
    """Teacher -> (T, C) integer codes."""
    second: dict[str, Codes] = field(default_factory=dict)
    """Teacher -> (T, C) codes of another cut that sounds at the same time, IGNORE elsewhere; empty unless tokens are mixed softly."""
    second_share: float = 0.0
    """Probability of the codes in `second`."""


class ShardReader:
    """Random access to the cuts of one split of one corpus.

    Args:
        folder: ``DATA/shards/<corpus>/<split>``. teachers: whose tokens to read where the shards have them; all by default.
    Raises:
        ArtifactError: the folder has no readable index.
    """

    def __init__(self, folder: Path, teachers: Sequence[str] | None = None) -> None:
        about = read_json(index_path(folder).with_suffix(".json"))
        if about.get("format") != FORMAT:
            raise ArtifactError(f"{folder} has shard format {about.get('format')}, but this version reads {FORMAT}: make the shards again")
        index = {name: tensor.numpy() for name, tensor in read_tensors(index_path(folder)).items()}
        self.folder = folder
        self.corpus: str = about["corpus"]
        self.domain: str = about["domain"]
        self.specs = {teacher: TokenSpec(**spec) for teacher, spec in about["tokens"].items() if teachers is None or teacher in teachers}
        self.samples: npt.NDArray[np.int64] = index["samples"]
        self._ids, self._id_ends = index["ids"].tobytes(), index["id_ends"]
        self._places = {name: index[name] for name in (AUDIO_FIELD, *map(token_field, self.specs))}
        self._starts = np.concatenate([[0], np.cumsum(index["shard_sizes"])])
        self._owner = new_owner()

    def __len__(self) -> int:
        return len(self.samples)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_owner"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _owner=new_owner())

    def __del__(self) -> None:
        if hasattr(self, "_owner"):
            FILES.drop(self._owner)

    @property
    def hours(self) -> float:
        """Hours of audio."""
        return float(self.samples.sum()) / SAMPLE_RATE / 3600

    def id(self, number: int) -> str:
        """Id of the cut at `number`, 0 to len - 1."""
        start = 0 if number == 0 else int(self._id_ends[number - 1])
        return self._ids[start : int(self._id_ends[number])].decode()

    def __getitem__(self, number: int) -> Item:
        """Read one cut.

        Raises:
            DataError: its bytes cannot be read or decoded; names cut and file.
        """
        cut_id = self.id(number)
        audio = self.audio(number)
        tokens = {teacher: self._npy(token_field(teacher), number, cut_id) for teacher in self.specs}
        return Item(cut_id, self.domain, audio, tokens)

    def audio(self, number: int) -> Audio:
        """(S,) float32 audio of one cut; raises as ``reader[number]``."""
        payload, path = self._payload(AUDIO_FIELD, number)
        try:
            audio, _ = soundfile.read(io.BytesIO(payload), dtype="float32")
        except (soundfile.LibsndfileError, RuntimeError) as error:
            raise DataError(f"cut {self.id(number)} in {path}: audio cannot be decoded: {error}", cause="decode") from error
        if len(audio) != self.samples[number]:
            message = f"cut {self.id(number)} in {path}: must hold {self.samples[number]} samples, but holds {len(audio)}"
            raise DataError(message, cause="length_mismatch")
        return np.asarray(audio)

    def _npy(self, field: str, number: int, cut_id: str) -> Codes:
        payload, path = self._payload(field, number)
        try:
            return np.asarray(np.load(io.BytesIO(payload), allow_pickle=False))
        except (ValueError, EOFError) as error:
            raise DataError(f"cut {cut_id} in {path}: tokens cannot be read: {error}", cause="decode") from error

    def _payload(self, field: str, number: int) -> tuple[bytes, Path]:
        shard = int(np.searchsorted(self._starts, number, side="right")) - 1
        path = shard_path(self.folder, field, shard)
        offset, size = (int(value) for value in self._places[field][number])
        try:
            payload = FILES.read(self._owner, path, offset, size)
        except OSError as error:
            raise DataError(f"cut {self.id(number)} in {path}: cannot be read: {error.strerror}", cause="missing_file") from error
        if len(payload) != size:
            raise DataError(f"cut {self.id(number)} in {path}: the file is shorter than its index says", cause="length_mismatch")
        return payload, path


class _Tar:
    """A tar file in the making, without times, owners or anything else that differs from run to run."""

    def __init__(self) -> None:
        self._members: list[tuple[str, bytes]] = []

    def add(self, cut_id: str, suffix: str, payload: bytes, manifest: dict[str, Any]) -> None:
        """Append a payload and the Lhotse manifest that describes it."""
        self._members += [(cut_id + suffix, payload), (cut_id + ".json", (json.dumps(manifest, ensure_ascii=False) + "\n").encode())]

    def write(self, path: Path) -> Tensor:
        """Write the archive atomically; returns (M, 2), offset and size in bytes of every payload."""
        packed, places = io.BytesIO(), []
        with tarfile.open(fileobj=packed, mode="w", format=tarfile.PAX_FORMAT) as tar:
            for name, payload in self._members:
                info = tarfile.TarInfo(name)
                info.size = len(payload)
                tar.addfile(info, io.BytesIO(payload))
                padded = -(-len(payload) // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
                places.append((tar.offset - padded, len(payload)))
        write_atomic(path, lambda temporary: void(temporary.write_bytes(packed.getbuffer())))
        return torch.tensor(places[::2], dtype=torch.int64).reshape(-1, 2)


def flac_bytes(audio: Audio) -> bytes:
    """16-bit FLAC; audio that was read from 16-bit files comes back bit for bit."""
    stream = io.BytesIO()
    codes = np.clip(np.rint(audio * 32768.0), -32768, 32767).astype(np.int16)
    soundfile.write(stream, codes, SAMPLE_RATE, format="FLAC", subtype="PCM_16")
    return stream.getvalue()


def _npy(codes: Codes) -> bytes:
    stream = io.BytesIO()
    np.save(stream, codes, allow_pickle=False)
    return stream.getvalue()


def _recording(cut: MonoCut, samples: int) -> Recording:
    return Recording(
        id=cut.recording.id,
        sources=[AudioSource(type="shar", channels=[0], source="")],
        sampling_rate=SAMPLE_RATE,
        num_samples=samples,
        duration=samples / SAMPLE_RATE,
        channel_ids=[0],
    )


def _moved_to_zero(cut: MonoCut) -> dict[str, Any]:
    """Custom fields of `cut` for a copy that starts at 0."""
    moved: dict[str, Any] = {}
    for key, value in (cut.custom or {}).items():
        if isinstance(value, TemporalArray):
            moved[key] = fastcopy(value, start=value.start - cut.start)
        elif key != DOWNMIX and not (isinstance(value, Recording) and cut.start > 0 and not cut.custom.get(f"{key}_unaligned")):
            moved[key] = value
    return moved


def _array(codes: Codes, frame_rate_hz: float, start_s: float = 0.0) -> TemporalArray:
    array = Array(storage_type="shar", storage_path="", storage_key="", shape=list(codes.shape))
    return TemporalArray(array=array, temporal_dim=0, frame_shift=1 / frame_rate_hz, start=start_s)
