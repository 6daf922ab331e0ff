"""Token stores: round trip, resume, and every way in which one can be wrong."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from spear.data.token_store import TokenStore, TokenWriter, block_path
from spear.errors import ArtifactError, DataError
from spear.types import TokenSpec

SPEC = TokenSpec(
    num_codebooks=3, codebook_size=256, frame_rate_hz=50.0, first_frame_s=0.0125, teacher_fingerprint="teacher", quantizer_fingerprint="quantizer"
)
LENGTHS = (5, 1, 0, 7, 3)


def some_codes(spec: TokenSpec = SPEC) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(5)
    return {f"cut-{i}": torch.randint(spec.codebook_size, (t, spec.num_codebooks), generator=generator) for i, t in enumerate(LENGTHS)}


def fill(folder: Path, spec: TokenSpec = SPEC, per_block: int = 2) -> dict[str, Tensor]:
    codes = some_codes(spec)
    writer, ids = TokenWriter(folder, spec), list(codes)
    for index, start in enumerate(range(0, len(ids), per_block)):
        block = ids[start : start + per_block]
        if writer.finished(index) is None:
            writer.write(index, block, [codes[cut_id] for cut_id in block], audio_s=1.5)
    writer.close(-(-len(ids) // per_block))
    return codes


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.mark.parametrize(("size", "dtype"), [(256, np.uint8), (2, np.uint8), (500, np.int16), (32768, np.int16), (40000, np.int32)])
def test_token_store_round_trip(tmp_path: Path, size: int, dtype: type) -> None:
    spec = TokenSpec(num_codebooks=3, codebook_size=size, frame_rate_hz=25.0, first_frame_s=0.015)
    codes = fill(tmp_path, spec)
    store = TokenStore.open(tmp_path)
    assert store.spec == spec
    assert store.ids == list(codes) == list(store)
    assert len(store) == len(codes)
    for cut_id, expected in reversed(codes.items()):
        found = store[cut_id]
        assert found.dtype == dtype
        assert found.shape == tuple(expected.shape)
        np.testing.assert_array_equal(found, expected.numpy())
        assert store.num_frames(cut_id) == len(expected)
    assert "cut-0" in store
    assert "cut-9" not in store


def test_token_store_reads_only_what_is_asked(tmp_path: Path) -> None:
    fill(tmp_path)
    store = TokenStore.open(tmp_path)
    for index in (0, 2):
        block_path(tmp_path, index).unlink()
    assert store["cut-3"].shape == (7, 3)
    with pytest.raises(ArtifactError, match=r"block-00000\.safetensors is not a readable block of tokens"):
        store["cut-0"]


def test_token_store_can_be_sent_to_a_worker(tmp_path: Path) -> None:
    codes = fill(tmp_path)
    store = TokenStore.open(tmp_path)
    assert store["cut-0"].size
    sent = pickle.loads(pickle.dumps(store))
    np.testing.assert_array_equal(sent["cut-3"], codes["cut-3"].numpy())


def test_token_store_keeps_few_blocks_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("spear.data.token_store.OPEN_BLOCKS", 1)
    codes = fill(tmp_path, per_block=1)
    store = TokenStore.open(tmp_path)
    for _ in range(2):
        for cut_id, expected in codes.items():
            np.testing.assert_array_equal(store[cut_id], expected.numpy())
    assert len(store._blocks) == 1


def test_token_writer_killed_and_run_again_gives_the_same_bytes(tmp_path: Path) -> None:
    fill(tmp_path / "whole")
    killed = tmp_path / "killed"
    codes = some_codes()
    writer = TokenWriter(killed, SPEC)
    writer.write(0, ["cut-0", "cut-1"], [codes["cut-0"], codes["cut-1"]], audio_s=1.5)
    stamp = block_path(killed, 0).stat().st_mtime_ns
    # killed between the codes and the JSON that says they are whole
    block_path(killed, 1).write_bytes(b"half of it")
    with pytest.raises(ArtifactError, match="is not a finished token store: run `spear tokens` first"):
        TokenStore.open(killed)
    fill(killed)
    assert contents(killed) == contents(tmp_path / "whole")
    assert block_path(killed, 0).stat().st_mtime_ns == stamp


def test_token_writer_raises_artifact_error_when_closed_with_a_block_missing(tmp_path: Path) -> None:
    writer = TokenWriter(tmp_path, SPEC)
    writer.write(0, [], [])
    with pytest.raises(ArtifactError, match=r"block-00001\.safetensors does not exist or is unfinished"):
        writer.close(2)


def test_token_writer_discards_a_block(tmp_path: Path) -> None:
    writer = TokenWriter(tmp_path, SPEC)
    writer.write(0, ["a"], [torch.zeros(2, 3, dtype=torch.uint8)])
    assert writer.finished(0) == {"ids": ["a"]}
    writer.discard(0)
    assert writer.finished(0) is None


@pytest.mark.parametrize(
    ("codes", "rule"),
    [
        (torch.zeros(2, 4), r"must be \(T, 3\), but are \(2, 4\)"),
        (torch.full((2, 3), 256), r"must be in 0\.\.255"),
        (torch.full((2, 3), -1), r"must be in 0\.\.255"),
    ],
)
def test_token_writer_raises_value_error_when_codes_do_not_fit(tmp_path: Path, codes: Tensor, rule: str) -> None:
    with pytest.raises(ValueError, match=rule):
        TokenWriter(tmp_path, SPEC).write(0, ["a"], [codes])


def test_token_store_of_no_cuts_is_empty(tmp_path: Path) -> None:
    TokenWriter(tmp_path, SPEC).close(0)
    assert TokenStore.open(tmp_path).ids == []


def test_token_store_raises_data_error_when_an_id_is_missing(tmp_path: Path) -> None:
    fill(tmp_path)
    with pytest.raises(DataError, match="the cut nobody has no tokens in") as caught:
        TokenStore.open(tmp_path)["nobody"]
    assert caught.value.cause == "missing_tokens"


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("frame_rate_hz", 25.0),
        ("num_codebooks", 8),
        ("codebook_size", 16),
        ("first_frame_s", 0.0),
        ("teacher_fingerprint", "x"),
        ("quantizer_fingerprint", "y"),
    ],
)
def test_token_store_check_raises_artifact_error_when_a_field_differs(tmp_path: Path, field: str, value: object) -> None:
    import dataclasses

    fill(tmp_path)
    store = TokenStore.open(tmp_path)
    store.check(SPEC)
    store.check(dataclasses.replace(SPEC, teacher_fingerprint="", quantizer_fingerprint=""))
    with pytest.raises(ArtifactError, match=f"`{field}` of the tokens in .* must be {value}, but is {getattr(SPEC, field)}"):
        store.check(dataclasses.replace(SPEC, **{field: value}))  # type: ignore[arg-type]


def test_token_store_raises_artifact_error_when_an_id_occurs_twice(tmp_path: Path) -> None:
    writer = TokenWriter(tmp_path, SPEC)
    for index in range(2):
        writer.write(index, ["a"], [torch.zeros(2, 3)])
    writer.close(2)
    with pytest.raises(ArtifactError, match="holds the cut a twice"):
        TokenStore.open(tmp_path)


def test_token_store_raises_artifact_error_when_ids_and_codes_disagree(tmp_path: Path) -> None:
    fill(tmp_path)
    (tmp_path / "block-00000.json").write_text(json.dumps({"ids": ["cut-0"]}))
    with pytest.raises(ArtifactError, match="must hold 5 cuts, but its blocks name 4"):
        TokenStore.open(tmp_path)
    (tmp_path / "block-00000.json").write_text(json.dumps({"ids": ["cut-0"]}))
    (tmp_path / "block-00002.json").write_text(json.dumps({"ids": ["cut-4", "cut-5"]}))
    store = TokenStore.open(tmp_path)
    with pytest.raises(ArtifactError, match=r"block-00000\.safetensors must hold the codes of the cuts its \.json names"):
        store["cut-0"]


def test_token_store_raises_artifact_error_when_its_description_lacks_a_key(tmp_path: Path) -> None:
    fill(tmp_path)
    values = json.loads((tmp_path / "store.json").read_text())
    del values["frame_rate_hz"]
    (tmp_path / "store.json").write_text(json.dumps(values))
    with pytest.raises(ArtifactError, match="must have the key 'frame_rate_hz'"):
        TokenStore.open(tmp_path)
