"""Audio through a teacher: groups in order whatever is read ahead, halves where memory ends, and the size of a batch."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from spear.errors import SpearError
from spear.teachers import Teacher, extract, pipeline
from spear.teachers.extraction import TokensConfig
from spear.teachers.logmel import LogMelConfig
from spear.teachers.pipeline import extract_cuts, extract_groups, find_batch_seconds
from tests.data.cuts import cut_of, save, tone

CPU = torch.device("cpu")


@pytest.fixture
def cuts(tmp_path: Path) -> list[Any]:
    return [cut_of(save(tmp_path / f"{i}.wav", tone(0.5 + 0.1 * (i * 7 % 10))), f"c{i}") for i in range(10)]


def small_memory(teacher: Teacher, samples: int) -> list[int]:
    """Let a teacher run out of memory above so many samples; returns where the sizes of its batches are put."""
    encode, sizes = teacher.encode, []

    def limited(audio: torch.Tensor, lens: torch.Tensor) -> Any:
        sizes.append(audio.numel())
        if audio.numel() > samples:
            raise torch.OutOfMemoryError("out of memory")
        return encode(audio, lens)

    teacher.encode = limited  # type: ignore[method-assign]
    return sizes


def test_extract_groups_gives_every_cut_of_every_group_in_order(cuts: list[Any]) -> None:
    teacher = LogMelConfig().build()
    parts = list(extract_groups(teacher, [(4, cuts[:6]), (9, cuts[6:])], batch_seconds=1.5, device=CPU))
    assert [part.group for part in parts] == sorted(part.group for part in parts)
    assert [part.group for part in parts if part.last] == [4, 9]
    for group, wanted in ((4, cuts[:6]), (9, cuts[6:])):
        outcomes = {outcome.cut_id: outcome for part in parts if part.group == group for outcome in part.outcomes}
        assert outcomes.keys() == {cut.id for cut in wanted}
        for cut in wanted:
            (alone,) = extract(teacher, [torch.from_numpy(cut.load_audio()[0])])
            assert torch.allclose(outcomes[cut.id].features, alone, atol=1e-5)  # type: ignore[arg-type]


def test_extract_groups_reads_the_next_group_while_the_teacher_works(cuts: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    read = threading.Event()
    load = pipeline._load

    def noted(batch: list[Any], rate: int) -> Any:
        if any(cut.id == "c9" for cut in batch):
            read.set()
        return load(batch, rate)

    monkeypatch.setattr(pipeline, "_load", noted)
    parts = extract_groups(LogMelConfig().build(), [(0, cuts[:9]), (1, cuts[9:])], batch_seconds=60.0, device=CPU)
    first = next(parts)
    assert first.group == 0
    assert read.wait(10)


def test_a_batch_that_does_not_fit_is_halved(cuts: list[Any]) -> None:
    teacher = LogMelConfig().build()
    whole = {o.cut_id: o.features for outcomes in extract_cuts(teacher, cuts, batch_seconds=60.0, device=CPU) for o in outcomes}
    sizes = small_memory(teacher, 50_000)
    found = {o.cut_id: o.features for outcomes in extract_cuts(teacher, cuts, batch_seconds=60.0, device=CPU) for o in outcomes}
    assert max(sizes) > 50_000 > min(sizes)
    assert found.keys() == whole.keys()
    assert all(torch.allclose(found[name], whole[name]) for name in whole)  # type: ignore[arg-type]


def test_extract_raises_spear_error_when_one_cut_does_not_fit(cuts: list[Any]) -> None:
    teacher = LogMelConfig().build()
    small_memory(teacher, 10_000)
    with pytest.raises(SpearError, match=r"a cut of 0\.\d s does not fit into the memory of cpu with logmel"):
        list(extract_cuts(teacher, cuts, batch_seconds=60.0, device=CPU))


def test_batch_seconds_on_a_cpu_is_ten_or_the_longest_cut() -> None:
    teacher = LogMelConfig().build()
    assert (find_batch_seconds(teacher, 4.0, CPU), find_batch_seconds(teacher, 25.0, CPU)) == (10.0, 25.0)
    assert TokensConfig(batch_seconds="auto").batch_seconds == "auto"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="fills the memory of a GPU")
def test_batch_seconds_on_a_gpu_fits_and_is_more_than_one_cut() -> None:
    device = torch.device("cuda")
    teacher = LogMelConfig().build().to(device)
    found = find_batch_seconds(teacher, 10.0, device)
    assert found >= 20.0
    samples = int(10.0 * teacher.sample_rate)
    teacher(torch.randn(int(found / 10), samples, device=device), torch.full((int(found / 10),), samples, device=device))


def test_batch_seconds_counts_the_memory_that_torch_gives_back(monkeypatch: pytest.MonkeyPatch) -> None:
    teacher, calls = LogMelConfig().build(), list[str]()
    peaks = iter([30, 70])
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: calls.append("empty"))
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda _: None)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda _: 0)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda _: next(peaks))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (calls.append("free") or 420, 500))  # type: ignore[func-returns-value]
    randn, full = torch.randn, torch.full
    monkeypatch.setattr(torch, "randn", lambda *sizes, device: randn(*sizes))
    monkeypatch.setattr(torch, "full", lambda size, value, device: full(size, value))
    # 20 bytes a cut and 10 besides: ten cuts fit into 210 bytes
    assert find_batch_seconds(teacher, 2.0, torch.device("cuda"), share=0.5) == 20.0
    assert calls[-2:] == ["empty", "free"]
    assert calls == ["empty"] * 3 + ["free"]
