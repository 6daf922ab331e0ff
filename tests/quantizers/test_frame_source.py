"""Frames in memory and on disk, shared out to processes, and fits on them."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.multiprocessing as mp
from torch import Tensor

from spear.errors import ArtifactError, DataError
from spear.files import read_json, write_json, write_tensors
from spear.quantizers import frame_source, mvq_alternating
from spear.quantizers.frame_source import UNIT_FRAMES, FrameSource, Sums
from spear.quantizers.mvq_fit import MVQConfig
from spear.quantizers.normalize import Normalizer
from spear.training.distributed import World, process_group
from tests.quantizers.frames import clustered

CONFIG = MVQConfig(num_codebooks=4, codebook_size=16, rounds=2, epochs=2, polish_rounds=2)
DIM = 8
ENDS = (3000, 3001, 7000)


def write_blocks(folder: Path, frames: Tensor, ends: tuple[int, ...] = ENDS) -> list[Path]:
    """Files of frames that end at `ends` and at the last frame."""
    starts = (0, *ends)
    paths = [folder / f"frames-{index}.safetensors" for index in range(len(starts))]
    for path, start, end in zip(paths, starts, (*ends, len(frames))):
        write_tensors(path, {"frames": frames[start:end].clone()})
    return paths


def test_frame_source_reads_across_files(tmp_path: Path) -> None:
    frames = clustered(9000, DIM)
    source = FrameSource(write_blocks(tmp_path, frames))
    assert (len(source), source.dim) == (9000, DIM)
    for start, stop in ((0, 9000), (2999, 3002), (3000, 3001), (3001, 7000), (8999, 9000), (5, 5), (9000, 9000)):
        assert torch.equal(source.read(start, stop), frames[start:stop])


def test_frame_source_gives_half_precision_as_float32(tmp_path: Path) -> None:
    frames = clustered(50, DIM).half()
    write_tensors(tmp_path / "frames.safetensors", {"frames": frames})
    assert torch.equal(FrameSource([tmp_path / "frames.safetensors"]).read(3, 40), frames[3:40].float())


@pytest.mark.parametrize("step", [1, 2])
def test_units_are_shared_out_without_rest(step: int) -> None:
    frames = clustered(9000, DIM)
    expected = [frames[start : start + UNIT_FRAMES] for start in range((step - 1) * UNIT_FRAMES, 9000, step * UNIT_FRAMES)]
    for size in (1, 2, 3):
        shares = [list(FrameSource([frames], World(rank, size)).units(step - 1, step)) for rank in range(size)]
        found = [shares[number % size][number // size] for number in range(len(expected))]
        assert sum(len(share) for share in shares) == len(expected)
        assert all(torch.equal(a, b) for a, b in zip(found, expected))


def test_epoch_gives_each_frame_at_most_once_whoever_reads_it(tmp_path: Path) -> None:
    frames = clustered(9000, DIM)
    paths = write_blocks(tmp_path, frames)
    alone = FrameSource([frames])
    whole = list(alone.epoch(512, seed=5))
    places = torch.cat([draw.places for batch in whole for draw in batch])
    assert len(places.unique()) == len(places) > 9000 - 2 * 512
    assert len(whole) == alone.steps(512)
    assert all(torch.equal(draw.frames, frames[draw.places]) for batch in whole for draw in batch)
    assert all(sum(len(draw.places) for draw in batch) == 512 for batch in whole)
    assert not torch.equal(places.sort().values, places)
    again = torch.cat([draw.places for batch in alone.epoch(512, seed=6) for draw in batch])
    assert not torch.equal(again, places)
    halves = [FrameSource(paths, World(rank, 2)).epoch(512, seed=5) for rank in range(2)]
    for batch, even, odd in zip(whole, *halves, strict=True):
        for draw, other in zip(batch, [part for pair in zip(even, odd) for part in pair], strict=True):
            assert torch.equal(draw.places, other.places)
            assert torch.equal(draw.frames, other.frames)


def test_epoch_mixes_frames_of_distant_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(frame_source, "_POOL_BYTES", 4 * DIM * 1024)
    frames = torch.arange(40_000.0)[:, None].expand(-1, DIM).contiguous()
    for batch in FrameSource([frames]).epoch(512, seed=0):
        for draw in batch:
            assert len((draw.places // 256).unique()) >= 4


def test_sums_depend_neither_on_order_nor_on_grouping() -> None:
    frames = clustered(5000, DIM)
    source, bound = FrameSource([frames]), float(frames.abs().max())
    found = []
    for rows in (frames, frames.flip(0), frames[torch.randperm(5000, generator=torch.Generator().manual_seed(0))]):
        sums = Sums((3, DIM), bound, len(frames))
        for part in rows.split(700):
            sums.add_at((part[:, :1] > 0).long() + (part[:, :1] > 3).long(), part)
        found.append(sums.total(source))
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])
    which = (frames[:, 0] > 0).long() + (frames[:, 0] > 3).long()
    expected = torch.zeros(3, DIM, dtype=torch.float64).index_add_(0, which, frames.double())
    torch.testing.assert_close(found[0], expected, atol=1e-9 * bound, rtol=1e-12)


def test_measure_finds_the_normaliser_and_the_largest_value(tmp_path: Path) -> None:
    frames = clustered(9000, DIM)
    source = FrameSource(write_blocks(tmp_path, frames))
    source.measure(normalize=True)
    expected = Normalizer.fit(frames)
    assert source.normalizer is not None
    torch.testing.assert_close(source.normalizer.mean, expected.mean)
    torch.testing.assert_close(source.normalizer.std, expected.std)
    assert float(source.read(0, 9000).abs().max()) <= source.peak
    source = FrameSource([frames])
    source.measure(normalize=False)
    assert source.peak == float(frames.abs().max())
    frames[8000, 2] = torch.inf
    with pytest.raises(DataError, match="training frames have non-finite values"):
        FrameSource(write_blocks(tmp_path, frames)).measure(normalize=True)


def test_frame_source_raises_artifact_error_when_files_do_not_fit(tmp_path: Path) -> None:
    good = write_blocks(tmp_path, clustered(9000, DIM))
    with pytest.raises(ArtifactError, match="other.safetensors does not exist"):
        FrameSource([*good, tmp_path / "other.safetensors"])
    write_tensors(tmp_path / "wide.safetensors", {"frames": torch.zeros(5, DIM + 1)})
    with pytest.raises(ArtifactError, match="frames have several widths, 8, 9"):
        FrameSource([*good, tmp_path / "wide.safetensors"])
    write_tensors(tmp_path / "flat.safetensors", {"frames": torch.zeros(5)})
    with pytest.raises(ArtifactError, match=r"must have a tensor `frames` of shape \(frames, channels\), but has \(5,\)"):
        FrameSource([tmp_path / "flat.safetensors"])
    source = FrameSource(good)
    good[1].write_bytes(b"no frames")
    with pytest.raises(ArtifactError, match="frames-1.safetensors is damaged"):
        source.read(2999, 3002)


def test_fit_of_files_equals_the_fit_of_memory(tmp_path: Path) -> None:
    train, heldout = clustered(9000, DIM), clustered(300, DIM, seed=1)
    expected = CONFIG.fit(train, heldout, seed=3).fingerprint()
    assert CONFIG.fit_source(FrameSource(write_blocks(tmp_path, train)), heldout, seed=3).fingerprint() == expected


def in_two_processes(rank: int, port: int, folder: Path) -> None:
    """Fit whole, then once more until the third round, where a stop comes; rank 0 writes what was fitted."""
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    paths, heldout = sorted(folder.glob("frames-*.safetensors")), clustered(300, DIM, seed=1)
    advance = mvq_alternating._Fit.advance

    def stops(fit: mvq_alternating._Fit, state: mvq_alternating._State) -> None:
        if state.made == 3:
            raise KeyboardInterrupt
        advance(fit, state)

    with process_group("cpu") as world:
        found = CONFIG.fit_source(FrameSource(paths, world), heldout, seed=3, checkpoint=folder / "whole.safetensors").fingerprint()
        told = world.gather(found)
        mvq_alternating._Fit.advance = stops  # type: ignore[method-assign]
        try:
            CONFIG.fit_source(FrameSource(paths, world), heldout, seed=3, checkpoint=folder / "stopped.safetensors")
        except KeyboardInterrupt:
            told.append("stopped")
        world.barrier()
    if rank == 0:
        write_json(folder / "told.json", told)


def test_fit_by_two_processes_equals_the_fit_by_one_and_resumes_in_one(tmp_path: Path) -> None:
    train, heldout = clustered(9000, DIM), clustered(300, DIM, seed=1)
    paths = write_blocks(tmp_path, train)
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        port = int(server.getsockname()[1])
    mp.spawn(in_two_processes, args=(port, tmp_path), nprocs=2)
    expected = CONFIG.fit(train, heldout, seed=3).fingerprint()
    assert read_json(tmp_path / "told.json") == [expected, expected, "stopped"]
    assert len(list(tmp_path.glob("stopped-codes-*.safetensors"))) == len(FrameSource(paths).lanes(4 * 128))
    resumed = CONFIG.fit_source(FrameSource(paths), heldout, seed=3, checkpoint=tmp_path / "stopped.safetensors")
    assert resumed.fingerprint() == expected


PEAK = """
import resource, sys
from pathlib import Path
import torch
from spear.quantizers import frame_source
from spear.quantizers.mvq_fit import MVQConfig
frame_source._POOL_BYTES = 2**18
torch.set_num_threads(1)
paths = sorted(Path(sys.argv[1]).glob("frames-*.safetensors"))
source = frame_source.FrameSource(paths[: int(sys.argv[2])])
config = MVQConfig(num_codebooks=2, codebook_size=4, rounds=1, epochs=1, polish_rounds=1)
config.fit_source(source, source.read(0, 100), seed=0)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


@pytest.mark.slow
def test_memory_of_a_fit_does_not_grow_with_the_data(tmp_path: Path) -> None:
    dim, frames = 128, 100_000
    for index in range(4):
        rows = torch.randn(frames, dim, generator=torch.Generator().manual_seed(index))
        write_tensors(tmp_path / f"frames-{index}.safetensors", {"frames": rows})

    def peak(files: int) -> int:
        """KiB at most of a process that fits on so many files of 49 MiB."""
        command = [sys.executable, "-c", PEAK, str(tmp_path), str(files)]
        return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)

    assert peak(4) - peak(1) < 0.1 * 3 * frames * dim * 4 / 1024
