"""``spear inspect``: stores described, and written as streams."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from spear.cli import main
from spear.commands.inspect_ import bars, describe
from spear.data.token_export import run_lengths
from spear.data.token_store import TokenStore, TokenWriter
from spear.types import TokenSpec

SPEC = TokenSpec(
    num_codebooks=2, codebook_size=4, frame_rate_hz=50.0, first_frame_s=0.0125, teacher_fingerprint="t" * 64, quantizer_fingerprint="q" * 64
)
CODES = {
    "a": [[0, 1], [0, 1], [3, 1], [0, 2]],
    "b": [],
    "c": [[2, 2], [2, 3]],
}


def write(folder: Path) -> Path:
    """A store of two blocks."""
    writer = TokenWriter(folder, SPEC)
    tensors = {name: torch.tensor(codes, dtype=torch.int64).reshape(-1, 2) for name, codes in CODES.items()}
    writer.write(0, ["a", "b"], [tensors["a"], tensors["b"]], failures=[], audio_s=0.1)
    writer.write(1, ["c"], [tensors["c"]], failures=[], audio_s=0.1)
    writer.close(2)
    return folder


def lines_of(path: Path) -> list[str]:
    return path.read_text().splitlines()


def test_run_lengths_are_undone_by_repeat() -> None:
    codes = np.random.default_rng(1).integers(0, 3, 200)
    values, durations = run_lengths(codes)
    np.testing.assert_array_equal(np.repeat(values, durations), codes)
    assert (values[1:] != values[:-1]).all()
    assert [len(item) for item in run_lengths(codes[:0])] == [0, 0]


def test_describe_gives_header_histogram_and_rows(tmp_path: Path) -> None:
    text = "\n".join(describe(TokenStore.open(write(tmp_path)), rows=1))
    assert "3 cuts, 6 frames at 50 Hz (first centred at 0.0125 s)" in text
    assert "2 codebooks of 4 entries" in text
    assert f"teacher {'t' * 12}, quantizer {'q' * 12}" in text
    shares = np.array([3, 2, 1]) / 6
    bits = -(shares * np.log2(shares)).sum()
    assert f"0      3   {bits:.2f}  0: 50.0 %, 2: 33.3 %  " in text  # codebook 0: three entries used
    assert "a: 4 frames" in text
    assert "0: 0 0 3 0 ..." in text
    assert "b: 0 frames" not in text


def test_bars_are_full_at_the_highest_and_blank_at_none() -> None:
    assert bars(torch.tensor([8, 4, 0, 1])) == "█▄ ▁"
    assert len(bars(torch.ones(256, dtype=torch.int64))) == 32


def test_inspect_writes_text_streams_of_every_store_below(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path / "tokens" / "x" / "train")
    write(tmp_path / "tokens" / "y")
    assert main(["inspect", str(tmp_path / "tokens"), "--out", str(tmp_path / "out")]) == 0
    assert capsys.readouterr().out.count("3 cuts, 6 frames") == 2
    for name in ("x/train", "y"):
        assert lines_of(tmp_path / "out" / name / "codebook-00.txt") == ["a\t0 0 3 0", "b\t", "c\t2 2"]
        assert lines_of(tmp_path / "out" / name / "codebook-01.txt") == ["a\t1 1 1 2", "b\t", "c\t2 3"]


def test_inspect_merges_repetitions_and_gives_durations(tmp_path: Path) -> None:
    write(tmp_path / "s")
    assert main(["inspect", str(tmp_path / "s"), "--out", str(tmp_path / "out"), "--dedup"]) == 0
    assert lines_of(tmp_path / "out" / "codebook-00.txt") == ["a\t0 3 0", "b\t", "c\t2"]
    assert lines_of(tmp_path / "out" / "codebook-00.durations.txt") == ["a\t2 1 1", "b\t", "c\t2"]
    assert lines_of(tmp_path / "out" / "codebook-01.txt") == ["a\t1 2", "b\t", "c\t2 3"]
    assert lines_of(tmp_path / "out" / "codebook-01.durations.txt") == ["a\t3 1", "b\t", "c\t1 1"]


@pytest.mark.parametrize("dedup", [False, True])
def test_inspect_writes_npz_of_every_block(tmp_path: Path, dedup: bool) -> None:
    write(tmp_path / "s")
    assert main(["inspect", str(tmp_path / "s"), "--out", str(tmp_path / "out"), "--format", "npz", *(["--dedup"] if dedup else [])]) == 0
    found: dict[str, list[list[int]]] = {}
    for path in sorted((tmp_path / "out").glob("*.npz")):
        with np.load(path, allow_pickle=False) as block:
            assert (block["frame_rate_hz"], block["first_frame_s"]) == (50.0, 0.0125)
            for place, name in enumerate(block["ids"].tolist()):
                if dedup:
                    books = []
                    for book in range(2):
                        start, stop = block[f"offsets_{book:02d}"][place : place + 2]
                        books.append(np.repeat(block[f"codes_{book:02d}"][start:stop], block[f"durations_{book:02d}"][start:stop]))
                    found[name] = np.stack(books, axis=1).tolist()
                else:
                    start, stop = block["offsets"][place : place + 2]
                    found[name] = block["codes"][start:stop].tolist()
    assert found == CODES


def test_inspect_exits_1_when_there_is_no_store(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(tmp_path)]) == 1
    assert "holds no finished token store: run `spear tokens` first" in capsys.readouterr().err
    write(tmp_path / "s")
    assert main(["inspect", str(tmp_path), "--dedup"]) == 1
    assert "`--dedup` needs `--out`" in capsys.readouterr().err
