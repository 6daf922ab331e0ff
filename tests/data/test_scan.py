"""The quick look at a source: the same ids, durations and files as the slow one, in little memory."""

from __future__ import annotations

import gzip
import json
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from lhotse import CutSet

from spear.data import sources
from spear.data.scan import Entry, manifest_entries, repeated, scan
from spear.data.sources import CutsSource, FolderSource
from spear.errors import DataError
from tests.data.cuts import cut_of, save, tone, write_cuts


@pytest.fixture
def manifest(tmp_path: Path) -> Path:
    """Mono, stereo, resampled and truncated cuts, with and without supervisions, and ids with characters that JSON escapes."""
    cuts: list[Any] = [
        cut_of(save(tmp_path / "a.wav", tone(1.0)), "plain"),
        cut_of(save(tmp_path / "b.wav", tone(1.5, 8000), 8000), 'quo"te\\d', speaker="ann", phones=[("a", 0.0, 0.5)]),
        cut_of(save(tmp_path / "s.wav", np.stack([tone(2.0), tone(2.0)], axis=1)), "stereo"),
        cut_of(save(tmp_path / "ü.flac", tone(3.0)), "ümlaut").truncate(offset=0.5, duration=1.25, preserve_id=True),
        cut_of(save(tmp_path / "c.wav", tone(1.0, 8000), 8000), "resampled").resample(16000),
    ]
    return Path(write_cuts(tmp_path / "cuts.jsonl.gz", cuts))


def slow(path: Path) -> list[tuple[str, float, int, str, bool]]:
    found = []
    for cut in CutSet.from_jsonl_lazy(path):
        found.append((cut.id, cut.duration, cut.sampling_rate, str(cut.recording.sources[0].source), bool(cut.supervisions)))
    return found


def quick(path: Path) -> list[tuple[str, float, int, str, bool]]:
    return [(e.id, e.seconds, e.sample_rate, json.loads(f'"{e.origin.decode()}"'), e.labelled) for e in manifest_entries(path)]


def test_manifest_entries_are_what_lhotse_reads(manifest: Path) -> None:
    assert quick(manifest) == slow(manifest)


def test_manifest_entries_read_other_layouts_of_json(manifest: Path, tmp_path: Path) -> None:
    values = [json.loads(line) for line in gzip.decompress(manifest.read_bytes()).splitlines()]
    other = tmp_path / "other.jsonl"
    other.write_text("\n\n".join(json.dumps(dict(reversed(value.items())), separators=(",", ":")) for value in values) + "\n")
    assert [entry[:3] for entry in quick(other)] == [entry[:3] for entry in slow(manifest)]
    compact = tmp_path / "compact.jsonl"
    compact.write_text("".join(json.dumps(value, separators=(",", ":")) + "\n" for value in values))
    assert [entry[:3] for entry in quick(compact)] == [entry[:3] for entry in slow(manifest)]


def test_entries_load_the_items_that_files_give(manifest: Path) -> None:
    source = CutsSource(train=str(manifest))
    for entry, item in zip(source.entries("train"), source.files("train"), strict=True):
        loaded = entry.load()
        assert (loaded.id, loaded.origin) == (item.id, item.origin)
        assert loaded.cut == item.cut


@pytest.mark.parametrize("line", ['{"id": "x"}', "no json", '{"id": "x", "start": 0, "duration": 1, "type": "PaddingCut"}'])
def test_manifest_entries_raise_data_error_when_a_line_is_no_cut(manifest: Path, line: str) -> None:
    manifest.write_bytes(gzip.compress(gzip.decompress(manifest.read_bytes()) + line.encode() + b"\n"))
    with pytest.raises(DataError, match=r"cuts\.jsonl\.gz"):
        list(manifest_entries(manifest))


def test_manifest_entries_raise_data_error_when_the_file_is_cut_short(manifest: Path) -> None:
    manifest.write_bytes(manifest.read_bytes()[:-20])
    with pytest.raises(DataError, match="is not a manifest of cuts"):
        list(manifest_entries(manifest))


def test_folder_entries_open_some_files_of_many(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for i in range(12):
        save(tmp_path / "sub" / f"{i:02d}.wav", tone(1.0 + (i % 2)))
    source = FolderSource(path=str(tmp_path), valid_share=0.0, test_share=0.0)
    assert [(e.id, e.seconds) for e in source.entries("train")] == [(f"sub--{i:02d}", 1.0 + i % 2) for i in range(12)]
    monkeypatch.setattr(sources, "HEADERS", 4)
    assert [e.seconds for e in source.entries("train")] == [1.0 + i % 2 if i % 3 == 0 else 0.0 for i in range(12)]
    found = scan("train", source.entries("train"), 3)
    assert found.hours == pytest.approx(1.5 * 12 / 3600)
    assert [entry.load().cut.duration for entry in source.entries("train")] == [1.0 + i % 2 for i in range(12)]  # type: ignore[union-attr]


def entries(count: int, same: int = 0) -> Any:
    for i in range(count):
        yield Entry(f"cut-{i % (count - same)}", 1.0 + i % 7, 16000, b"file-%d" % (i % 50), False, lambda: None)  # type: ignore[arg-type, return-value]


def test_scan_counts_and_samples_with_the_longest_first() -> None:
    found = scan("train", entries(1000), 10)
    assert (found.cuts, dict(found.rates), len(found.files)) == (1000, {16000: 1000}, 50)
    assert found.hours == pytest.approx(sum(1 + i % 7 for i in range(1000)) / 3600)
    assert len({entry.id for entry in found.sample}) == 10
    assert found.sample[0].seconds == 7.0
    assert [entry.id for entry in found.sample] == [entry.id for entry in scan("train", entries(1000), 10).sample]
    places = [int(entry.id.split("-")[1]) for entry in found.sample[1:]]
    assert max(places) > 500 > min(places)


def test_repeated_finds_ids_that_occur_twice() -> None:
    assert repeated([scan("a", entries(100), 3).ids]) == set()
    assert repeated([scan("a", entries(100, same=2), 3).ids]) == {hash("cut-0"), hash("cut-1")}
    assert len(repeated([scan("a", entries(100), 3).ids, scan("b", entries(50), 3).ids])) == 50


def test_scan_keeps_less_than_fifty_bytes_a_cut() -> None:
    tracemalloc.start()
    found = scan("train", entries(100_000), 20)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert found.cuts == 100_000
    assert peak < 50 * 100_000
