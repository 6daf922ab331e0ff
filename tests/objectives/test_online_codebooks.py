"""Online codebooks against loops over books and codes, and over processes."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from spear.objectives.online_codebooks import OnlineCodebooks, _sums_by_code, perplexities

BOOKS, SIZE, DIM, DECAY = 3, 7, 5, 0.9


def make(seed: int = 0) -> OnlineCodebooks:
    torch.manual_seed(seed)
    return OnlineCodebooks(BOOKS, SIZE, DIM, DECAY)


def draw(seed: int, frames: int = 40) -> torch.Tensor:
    return torch.randn(BOOKS, frames, DIM, generator=torch.Generator().manual_seed(seed))


def reference_step(sums: torch.Tensor, counts: torch.Tensor, frames: torch.Tensor) -> torch.Tensor:
    """Book by book and code by code, in place; returns the codes."""
    codes = torch.zeros(BOOKS, frames.shape[1], dtype=torch.int64)
    for book in range(BOOKS):
        entries = [sums[book, k] / counts[book, k] for k in range(SIZE)]
        for m in range(frames.shape[1]):
            distances = [float((frames[book, m] - entry).square().sum()) for entry in entries]
            codes[book, m] = distances.index(min(distances))
        for k in range(SIZE):
            mine = frames[book][codes[book] == k]
            if len(mine):
                counts[book, k] = DECAY * counts[book, k] + (1 - DECAY) * len(mine)
                sums[book, k] = DECAY * sums[book, k] + (1 - DECAY) * mine.sum(dim=0)
    return codes


def test_codebooks_follow_a_loop_over_books_and_codes() -> None:
    books = make()
    sums, counts = books.sums.clone(), books.counts.clone()
    for step in range(5):
        frames = draw(step)
        codes = books.assign(frames)
        books.collect(frames, codes, codes, torch.ones(frames.shape[1]))
        books.update()
        assert torch.equal(codes, reference_step(sums, counts, frames))
        torch.testing.assert_close(books.sums, sums)
        torch.testing.assert_close(books.counts, counts)


def test_codebooks_keep_entries_that_no_frame_is_near_to() -> None:
    books = make()
    before = books.sums.clone(), books.counts.clone()
    frames = books.entries()[:, :1].expand(-1, 10, -1).contiguous()  # all at entry 0
    books.collect(frames, books.assign(frames), books.assign(frames), torch.ones(10))
    books.update()
    assert torch.equal(books.sums[:, 1:], before[0][:, 1:])
    assert torch.equal(books.counts[:, 1:], before[1][:, 1:])
    torch.testing.assert_close(books.counts[:, 0], torch.full((BOOKS,), 0.9 + 0.1 * 10))
    torch.testing.assert_close(books.entries()[:, 0], frames[:, 0])


def test_codebooks_ignore_frames_of_weight_0_and_a_discarded_update() -> None:
    books, other = make(), make()
    frames = draw(1)
    codes = books.assign(frames)
    weight = (torch.arange(40) < 25).float()
    books.collect(frames, codes, codes, torch.ones(40))
    books.discard()
    books.collect(frames, codes, codes, weight)
    other.collect(frames[:, :25], codes[:, :25], codes[:, :25], torch.ones(25))
    books.update()
    other.update()
    torch.testing.assert_close(books.state_dict(), other.state_dict())


def test_sums_are_the_same_by_addition_and_by_product(monkeypatch: pytest.MonkeyPatch) -> None:
    frames, codes, weight = draw(2), torch.randint(SIZE, (BOOKS, 40)), (torch.rand(40) < 0.5).float()
    added = _sums_by_code(frames, codes, weight, SIZE)
    chosen = torch.nn.functional.one_hot(codes, SIZE).float() * weight[:, None]
    torch.testing.assert_close(added, torch.bmm(chosen.transpose(1, 2), frames))


def test_codebooks_start_with_normalised_noise() -> None:
    books = OnlineCodebooks(2, 4000, 3, DECAY)
    torch.testing.assert_close(books.sums.mean(dim=1), torch.zeros(2, 3), atol=1e-5, rtol=0)
    torch.testing.assert_close(books.sums.var(dim=1, correction=0), torch.ones(2, 3), atol=1e-4, rtol=0)
    assert (books.counts == 1).all()


def test_split_moves_idle_entries_beside_the_most_used_and_halves_those() -> None:
    books = make()
    hits = torch.tensor([4.0, 100.0, 0.0, 50.0, 30.0, 0.0, 20.0]).expand(BOOKS, -1)
    books.recent.copy_(hits)
    books.counts.copy_(hits + 2)
    books.sums.copy_(books.entries() * books.counts[:, :, None] ** 2)
    entries, counts = books.entries(), books.counts.clone()
    books.split()
    for idle, donor in ((2, 1), (5, 3)):  # 4 hits of 204 are more than a tenth of an even share
        torch.testing.assert_close(books.counts[:, [idle, donor]], (counts[:, donor] / 2)[:, None].expand(-1, 2))
        torch.testing.assert_close(books.entries()[:, donor], entries[:, donor])
        torch.testing.assert_close(books.entries()[:, idle], entries[:, donor] + 0.1 * entries[:, idle])
    kept = [0, 4, 6]
    torch.testing.assert_close(books.entries()[:, kept], entries[:, kept])
    assert torch.equal(books.counts[:, kept], counts[:, kept])
    assert not books.recent.any()


def test_split_keeps_more_entries_in_use() -> None:
    active = []
    for split in (False, True):
        books = make()
        for step in range(60):
            frames = draw(step, 60) * 0.1 + 3.0  # far from all entries but one
            codes = books.assign(frames)
            books.collect(frames, codes, codes, torch.ones(60))
            books.update()
            if split and step % 10 == 9:
                books.split()
        active.append(books.assign(draw(99, 400) * 0.1 + 3.0).unique().numel())
    assert active[0] <= 3
    assert active[1] == SIZE


def test_perplexities_of_known_shares() -> None:
    shares = torch.tensor([[0.25, 0.25, 0.25, 0.25], [1.0, 0.0, 0.0, 0.0], [2.0, 2.0, 0.0, 0.001]])
    perplexity, active = perplexities(shares)
    torch.testing.assert_close(perplexity[:2], torch.tensor([4.0, 1.0]))
    assert math.isclose(float(perplexity[2]), 2.0, rel_tol=0.01)
    assert active.tolist() == [4.0, 1.0, 2.0]


def test_usage_is_a_running_mean_of_shares() -> None:
    books = make()
    frames = books.entries()[:, :2].contiguous()
    codes = torch.tensor([[0, 1]] * BOOKS)
    books.collect(frames, codes, codes * 0, torch.ones(2))
    books.update()
    torch.testing.assert_close(books.usage[0, :, :3], torch.tensor([[0.005, 0.005, 0.0]] * BOOKS))
    torch.testing.assert_close(books.usage[1, :, :3], torch.tensor([[0.01, 0.0, 0.0]] * BOOKS))
    torch.testing.assert_close(books.measure(codes, codes * 0, torch.ones(2))[0, 0, :2], torch.tensor([0.5, 0.5]))


def _work(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    books = make(seed=0)
    calls = []
    reduce = dist.all_reduce
    dist.all_reduce = lambda tensor: calls.append(tensor.numel()) or reduce(tensor)
    for step in range(3):
        frames = draw(10 * step + rank, 20 + 5 * rank)
        codes = books.assign(frames)
        books.collect(frames, codes, codes, torch.ones(frames.shape[1]))
        books.update()
    assert len(calls) == 3
    torch.save(books.state_dict(), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_codebooks_of_two_processes_are_those_of_one(tmp_path: Path) -> None:
    mp.spawn(_work, args=(str(tmp_path),), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2))
    books = make(seed=0)
    for step in range(3):
        batches = [draw(10 * step + rank, 20 + 5 * rank) for rank in range(2)]
        for frames, codes in [(frames, books.assign(frames)) for frames in batches]:
            books.collect(frames, codes, codes, torch.ones(frames.shape[1]))
        books.update()
    for name, value in books.state_dict().items():
        assert torch.equal(first[name], second[name])
        torch.testing.assert_close(first[name], value)
