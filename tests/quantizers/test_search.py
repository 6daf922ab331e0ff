"""The table search against its definition."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from torch import Tensor

from spear import native
from spear.quantizers import merge_search
from spear.quantizers.kernels import search_loops
from spear.quantizers.merge_search import Tables, list_length, smallest
from spear.quantizers.search import (
    BLOCK_FRAMES,
    DEVICE_BLOCKS,
    block_frames,
    errors,
    frame_costs,
    frames_within,
    make_tables,
    refine,
    sweep,
)
from tests.quantizers import frames as reference


@pytest.mark.parametrize(
    ("num", "size", "dim", "base"), [(1, 32, 8, 16), (2, 32, 8, 16), (4, 32, 12, 16), (8, 32, 12, 16), (16, 16, 24, 8), (4, 4, 6, 8), (4, 2, 6, 8)]
)
def test_refine_follows_the_definition(num: int, size: int, dim: int, base: int) -> None:
    generator = torch.Generator().manual_seed(num)
    centres = torch.randn(num, size, dim, generator=generator) + 2.0
    frames = torch.randn(4, dim, generator=generator) * num**0.5 + 2.0 * num
    codes = torch.randint(size, (4, num), generator=generator)
    tables = make_tables(centres)
    found = refine(tables, frame_costs(tables, frames), codes, 1)
    expected = [reference.merge_search(centres.double(), frame.double(), row.tolist(), base) for frame, row in zip(frames, codes)]
    assert found.tolist() == expected


def test_refine_leaves_its_input_alone_and_repeats_itself() -> None:
    generator = torch.Generator().manual_seed(0)
    tables = make_tables(torch.randn(4, 32, 8, generator=generator))
    frames, codes = torch.randn(300, 8, generator=generator), torch.randint(32, (300, 4), generator=generator)
    costs, before = frame_costs(tables, frames), codes.clone()
    kept = costs.clone()
    twice = refine(tables, costs, refine(tables, costs, codes, 1), 1)
    assert torch.equal(refine(tables, costs, codes, 2), twice)
    assert torch.equal(codes, before)
    assert torch.equal(costs, kept)


def test_frame_costs_are_squared_distances_less_a_constant() -> None:
    centres = torch.randn(1, 16, 5, generator=torch.Generator().manual_seed(0)) + 3.0
    frames = torch.randn(7, 5, generator=torch.Generator().manual_seed(1)) + 3.0
    costs = frame_costs(make_tables(centres), frames)
    distances = (frames[:, None] - centres[0]).square().sum(-1)
    torch.testing.assert_close(costs - costs[:, :1], distances - distances[:, :1], atol=1e-4, rtol=0)


def test_list_length_doubles_per_factor_four_up_to_128() -> None:
    assert [list_length(n, 256) for n in (1, 2, 4, 8, 16, 32, 64, 256)] == [16, 16, 32, 32, 64, 64, 128, 128]
    assert [list_length(n, 16) for n in (1, 4, 16)] == [8, 16, 32]


@pytest.mark.parametrize("size", [17, 64, 256, 1024])
def test_smallest_finds_values_and_places(size: int) -> None:
    values = torch.randn(5, 3, size, generator=torch.Generator().manual_seed(size))
    values[0, 0, ::3] = 0.0
    found, index = smallest(values.clone(), 16)
    assert torch.equal(values.gather(-1, index), found)
    assert torch.equal(found.sort(dim=-1).values, values.sort(dim=-1).values[..., :16])
    assert all(len(set(row)) == 16 for row in index.view(-1, 16).tolist())
    torch.testing.assert_close(smallest(values.double(), 16)[0].sort(dim=-1).values.float(), found.sort(dim=-1).values)


@pytest.fixture
def compiled() -> None:
    if search_loops() is None:
        pytest.skip("needs a C++ compiler")


def problem(num: int, size: int, dim: int, *, whole: bool) -> tuple[Tables, Tensor, Tensor]:
    """Tables, costs and start codes of random centres; whole numbers make many entries equally good."""
    generator = torch.Generator().manual_seed(num * size)
    centres = torch.randn(num, size, dim, generator=generator)
    frames = num**0.5 * torch.randn(150, dim, generator=generator)
    tables = make_tables(centres.round() if whole else centres)
    codes = torch.randint(size, (150, num), generator=generator)
    return tables, frame_costs(tables, frames.round() if whole else frames), codes


@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize(
    ("num", "size", "dim"), [(1, 64, 5), (2, 256, 9), (8, 64, 12), (16, 256, 24), (32, 16, 24), (8, 2, 7), (4, 8, 3), (64, 4, 16)]
)
def test_compiled_loops_give_the_codes_of_torch(monkeypatch: pytest.MonkeyPatch, num: int, size: int, dim: int, whole: bool) -> None:
    tables, costs, codes = problem(num, size, dim, whole=whole)

    def found() -> list[Tensor]:
        refined = [refine(tables, costs, codes, iters) for iters in (0, 1, 4)]
        return [*refined, refine(tables, costs, codes, 4, keep_best=True), sweep(tables, costs, None, 2), sweep(tables, costs, codes, 2)]

    fast = found()
    monkeypatch.setenv(native.SWITCH, "0")
    for ours, plain in zip(fast, found()):
        assert torch.equal(ours, plain)


@pytest.mark.usefixtures("compiled")
def test_compiled_loops_do_not_depend_on_the_number_of_threads_or_on_other_frames() -> None:
    tables, costs, codes = problem(8, 64, 12, whole=False)
    whole, threads = refine(tables, costs, codes, 3), torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        assert torch.equal(refine(tables, costs, codes, 3), whole)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(torch.cat([refine(tables, costs[rows], codes[rows], 3) for rows in torch.arange(150).split([1, 60, 89])]), whole)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_refine_keeps_to_the_codebooks_when_costs_are_not_finite(bad: float) -> None:
    tables, costs, codes = problem(4, 32, 6, whole=False)
    costs[:, ::3] = bad
    for found in (refine(tables, costs, codes, 3), sweep(tables, costs, None, 2)):
        assert int(found.min()) >= 0
        assert int(found.max()) < 32


def test_refine_with_keep_best_never_raises_an_error() -> None:
    tables, costs, codes = problem(16, 64, 6, whole=False)
    last, best = refine(tables, costs, codes, 5), refine(tables, costs, codes, 5, keep_best=True)
    assert bool((errors(tables, costs, best) <= torch.minimum(errors(tables, costs, last), errors(tables, costs, codes))).all())
    assert bool((errors(tables, costs, last) > errors(tables, costs, best)).any())


def test_errors_are_squared_distances_less_the_norm_of_the_frame() -> None:
    generator = torch.Generator().manual_seed(0)
    centres, frames = torch.randn(4, 8, 6, generator=generator), torch.randn(20, 6, generator=generator)
    codes = torch.randint(8, (20, 4), generator=generator)
    tables = make_tables(centres)
    direct = (sum(centres[c][codes[:, c]] for c in range(4)) - frames).square().sum(1)
    found = errors(tables, frame_costs(tables, frames), codes) + (frames - tables.shift).square().sum(1)
    torch.testing.assert_close(found, direct, atol=1e-4, rtol=1e-5)


def test_fresh_sweep_decides_each_codebook_on_what_is_left() -> None:
    generator = torch.Generator().manual_seed(0)
    centres, frames = torch.randn(3, 8, 5, generator=generator), torch.randn(30, 5, generator=generator)
    centres -= centres.mean(1, keepdim=True)
    tables = make_tables(centres)
    left, expected = frames, []
    for book in centres:
        expected.append((left[:, None] - book).square().sum(-1).argmin(1))
        left = left - book[expected[-1]]
    assert torch.equal(sweep(tables, frame_costs(tables, frames), None, 1), torch.stack(expected, dim=1))


def test_search_runs_in_torch_and_says_so_once_when_there_is_no_compiler(tmp_path: os.PathLike[str]) -> None:
    program = (
        "import logging, torch; logging.basicConfig(format='%(message)s'); from spear.quantizers import MVQ; torch.manual_seed(0);"
        "q = MVQ(6, 4, 16); [q.encode(torch.randn(5, 6)) for _ in range(2)]"
    )
    environment = {**os.environ, "PATH": "/nowhere", "CXX": "", "XDG_CACHE_HOME": str(tmp_path), native.SWITCH: "1"}
    said = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True).stderr
    assert said.count("no compiled loops, so the search of MVQ runs in plain torch") == 1


def test_merge_round_makes_its_index_tensors_once_in_or_out_of_inference_mode() -> None:
    tables, costs, codes = problem(16, 16, 24, whole=False)
    made = (merge_search._pairs, merge_search._part_places, merge_search._starts)
    for kept in made:
        kept.cache_clear()
    with torch.inference_mode():
        first = merge_search.merge_round(tables, costs, codes)
    misses = [kept.cache_info().misses for kept in made]
    second = merge_search.merge_round(tables, costs, codes)
    assert torch.equal(first, second)
    assert [kept.cache_info().misses for kept in made] == misses
    assert not merge_search._pairs(16, costs.device).left.is_inference()
    assert misses == [4, 8, 5]  # levels of 16, 8, 4 and 2 lists; parts of 4 and 2; neighbours, and parts of pairs


def test_frames_within_are_whole_blocks_that_fit() -> None:
    per_frame = 4 * 16 * 256 + 32 * 28 * 256
    assert frames_within(0, 16, 256) == BLOCK_FRAMES
    assert frames_within(3.5 * BLOCK_FRAMES * per_frame, 16, 256) == 3 * BLOCK_FRAMES
    assert frames_within(1e15, 16, 256) == DEVICE_BLOCKS * BLOCK_FRAMES
    assert frames_within(1e15, 1, 2) == DEVICE_BLOCKS * BLOCK_FRAMES
    assert block_frames(torch.device("cpu"), 16, 256) == BLOCK_FRAMES
