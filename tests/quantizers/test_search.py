"""The table search against its definition."""

from __future__ import annotations

import pytest
import torch

from spear.quantizers.search import frame_costs, list_length, make_tables, refine, smallest
from tests.quantizers.frames import merge_search


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
    expected = [merge_search(centres.double(), frame.double(), row.tolist(), base) for frame, row in zip(frames, codes)]
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
