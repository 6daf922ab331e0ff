"""Frames of teachers against frames of the student, at every ratio of rates."""

from __future__ import annotations

import pytest
import torch

from spear.errors import ConfigError
from spear.objectives.alignment import align_tokens, frame_map
from spear.types import IGNORE, TokenSpec


def spec(rate: float, first: float = 0.0) -> TokenSpec:
    return TokenSpec(num_codebooks=2, codebook_size=256, frame_rate_hz=rate, first_frame_s=first)


def tokens(frames: int) -> torch.Tensor:
    return torch.stack([torch.arange(frames), torch.arange(frames) + 100], dim=1)[None]  # (1, T, 2)


@pytest.mark.parametrize(
    ("teacher_hz", "student_hz", "group", "first_rows"),
    [
        (50.0, 50.0, 1, [[0, 100], [1, 101], [2, 102]]),
        (50.0, 25.0, 2, [[0, 100, 1, 101], [2, 102, 3, 103]]),
        (25.0, 50.0, 1, [[0, 100], [0, 100], [1, 101], [1, 101]]),
        (75.0, 50.0, 2, [[0, 100, 1, 101], [1, 101, 2, 102], [3, 103, 4, 104]]),
        (100.0, 50.0, 2, [[0, 100, 1, 101], [2, 102, 3, 103]]),
        (12.5, 50.0, 1, [[0, 100]] * 4 + [[1, 101]]),
        (16000 / 384, 50.0, 1, [[0, 100], [0, 100], [1, 101], [2, 102], [3, 103], [4, 104], [5, 105]]),
    ],
)
def test_align_by_index_follows_the_declared_rates(teacher_hz: float, student_hz: float, group: int, first_rows: list[list[int]]) -> None:
    frames = frame_map(spec(teacher_hz), student_hz, 0.0, "index")
    assert frames.group == group
    out = align_tokens(tokens(40), torch.tensor([40]), frames, torch.tensor([10]), 10)
    assert out.shape == (1, 10, 2 * group)
    assert out[0, : len(first_rows)].tolist() == first_rows


def test_align_ignores_frames_beyond_either_length() -> None:
    frames = frame_map(spec(50.0), 50.0, 0.0, "index")
    batch = tokens(8).repeat(2, 1, 1)
    out = align_tokens(batch, torch.tensor([8, 3]), frames, torch.tensor([5, 6]), 6)
    assert (out[0, :5] != IGNORE).all()
    assert (out[0, 5:] == IGNORE).all()
    assert (out[1, :3] != IGNORE).all()
    assert (out[1, 3:] == IGNORE).all()


def test_align_ignores_groups_that_are_only_partly_there() -> None:
    frames = frame_map(spec(50.0), 25.0, 0.0, "index")
    out = align_tokens(tokens(5), torch.tensor([5]), frames, torch.tensor([3]), 3)
    assert out[0, 2].tolist() == [4, 104, IGNORE, IGNORE]


def test_align_of_a_teacher_without_tokens_is_all_ignore() -> None:
    frames = frame_map(spec(50.0), 50.0, 0.0, "index")
    out = align_tokens(torch.empty(2, 0, 3, dtype=torch.int64), torch.zeros(2, dtype=torch.int64), frames, torch.tensor([4, 2]), 4)
    assert out.shape == (2, 4, 3)
    assert (out == IGNORE).all()


@pytest.mark.parametrize(
    ("teacher_hz", "teacher_first", "student_hz", "student_first"),
    [(50, 0.0125, 50, 0.045), (25, 0.02, 50, 0.045), (75, 0.005, 50, 0.045), (50, 0.0125, 25, 0.055)],
)
def test_align_by_time_picks_the_nearest_group(teacher_hz: float, teacher_first: float, student_hz: float, student_first: float) -> None:
    frames = frame_map(spec(teacher_hz, teacher_first), student_hz, student_first, "time")
    index = frames.indices(20).double()
    centre = teacher_first + index.mean(dim=1) / teacher_hz
    wanted = student_first + torch.arange(20).double() / student_hz
    assert (centre - wanted).abs().max() <= 0.5 / teacher_hz + 1e-9


def test_wavlm_is_two_frames_early_by_time() -> None:
    frames = frame_map(spec(50.0, 0.0125), 50.0, 0.045, "time")
    assert frames.indices(3)[:, 0].tolist() == [2, 3, 4]  # 32.5 ms = 1.6 frames, rounded


@pytest.mark.parametrize("rate", [0.0, -50.0])
def test_frame_map_raises_config_error_when_a_rate_is_not_positive(rate: float) -> None:
    with pytest.raises(ConfigError, match="frame rates must be positive"):
        frame_map(spec(rate), 50.0, 0.0, "index")


def test_frame_map_raises_config_error_when_the_ratio_is_no_simple_fraction() -> None:
    with pytest.raises(ConfigError, match="must be a fraction"):
        frame_map(spec(50.0 * 3.14159265), 50.0, 0.0, "index")


@pytest.mark.parametrize(
    ("teacher_hz", "teacher_first", "student_hz", "student_first", "group"),
    [(50, 0.0125, 50, 0.045, 1), (25, 0.02, 50, 0.045, 1), (75, 0.005, 50, 0.045, 2), (100, 0.005, 50, 0.04, 2), (12.5, 0.04, 50, 0.01, 1)],
)
def test_align_by_interpolation_puts_the_weighted_mean_of_two_frames_on_the_students_centre(
    teacher_hz: float, teacher_first: float, student_hz: float, student_first: float, group: int
) -> None:
    frames = frame_map(spec(teacher_hz, teacher_first), student_hz, student_first, "interpolate")
    lower, upper, share = frames.indices(20), frames.indices(20, upper=True), frames.share(20)
    assert lower.shape == upper.shape == (20, group)
    assert share.shape == (20,)
    assert ((share >= 0) & (share < 1)).all()
    assert torch.equal(upper - lower, (share > 0).long()[:, None].expand(20, group))  # the same frame where the point is its centre
    times = [teacher_first + index.double() / teacher_hz for index in (lower, upper)]
    points = torch.lerp(times[0], times[1], share.double()[:, None])  # (T, group)
    wanted = student_first + torch.arange(20).double() / student_hz
    torch.testing.assert_close(points.mean(dim=1), wanted, atol=1e-6, rtol=0)
    torch.testing.assert_close(points.diff(dim=1), torch.full((20, group - 1), 1 / teacher_hz, dtype=torch.float64), atol=1e-6, rtol=0)


def test_wavlm_counts_three_to_five_eighths_by_interpolation() -> None:
    frames = frame_map(spec(50.0, 0.0125), 50.0, 0.045, "interpolate")
    assert frames.indices(3)[:, 0].tolist() == [1, 2, 3]  # 32.5 ms = 1.625 frames
    assert frames.share(3).tolist() == [0.625] * 3
    found = [align_tokens(tokens(4), torch.tensor([4]), frames, torch.tensor([5]), 5, upper=upper)[0, :, 0].tolist() for upper in (False, True)]
    assert found == [[1, 2, 3, IGNORE, IGNORE], [2, 3, IGNORE, IGNORE, IGNORE]]
