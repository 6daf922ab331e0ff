"""Masks: their shares, their bounds and their corner cases."""

from __future__ import annotations

import pytest
import torch

from spear.errors import ConfigError
from spear.models.masking import MaskConfig, block_mask, draw_masks, span_mask


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize(("prob", "share"), [(0.5, 0.403), (0.65, 0.49)])
def test_span_mask_has_the_published_share(prob: float, share: float) -> None:
    lens = torch.full((400,), 1000)
    time, _ = draw_masks(MaskConfig(time_prob=prob), lens, 1000, 128, generator())
    assert float(time.sum() / lens.sum()) == pytest.approx(share, abs=0.006)


@pytest.mark.parametrize(("length", "share"), [(15, 0.231), (20, 0.237)])
def test_channel_mask_has_the_published_share(length: int, share: float) -> None:
    _, channel = draw_masks(MaskConfig(channel_length=length), torch.full((4000,), 20), 20, 128, generator())
    assert float(channel.float().mean()) == pytest.approx(share, abs=0.006)


def test_span_mask_spans_are_whole_and_at_least_two() -> None:
    mask = span_mask(torch.full((200,), 60), 60, 0.0, 10, 2, generator())
    assert int(mask.sum(1).min()) >= 11  # two distinct starts
    assert int(mask.sum(1).max()) == 20
    assert not mask[:, -1].any()


def test_block_mask_share_is_its_probability_and_blocks_are_whole() -> None:
    config = MaskConfig(mode="block", time_prob=0.5)
    lens = torch.full((400,), 1005)
    time, _ = draw_masks(config, lens, 1005, 128, generator())
    assert float(time.sum() / lens.sum()) == pytest.approx(0.5 * 1000 / 1005, abs=0.006)
    assert not time[:, 1000:].any()
    blocks = time[:, :1000].unflatten(1, (100, 10))
    assert torch.equal(blocks.any(2), blocks.all(2))


def test_block_mask_has_the_least_number_of_blocks() -> None:
    mask = block_mask(torch.tensor([100, 30, 25, 20, 9]), 100, 0.0, 10, 2, generator())
    # an item of exactly two blocks keeps its last frame, one shorter than a block has no block
    assert mask.sum(1).tolist() == [20, 20, 20, 19, 0]


@pytest.mark.parametrize("mode", ["span", "block"])
@pytest.mark.parametrize("length", [1, 2, 10])
@pytest.mark.parametrize("prob", [0.0, 0.65, 1.0])
def test_masks_stay_within_the_item_and_never_cover_it(mode: str, length: int, prob: float) -> None:
    lens = torch.arange(0, 64).repeat(8)
    config = MaskConfig(mode=mode, time_prob=prob, time_length=length)  # type: ignore[arg-type]
    time, channel = draw_masks(config, lens, 70, 128, generator())
    assert time.shape == (512, 70)
    assert not time[torch.arange(70) >= lens[:, None]].any()
    assert (time.sum(1)[lens > 0] < lens[lens > 0]).all()
    assert not time[lens < length].any()
    assert not time[lens <= 1].any()
    assert not channel.all(1).any()
    if prob > 0.0:
        assert time[lens >= 4 * length].any(1).all()


def test_masks_of_one_frame_and_of_no_item_are_empty() -> None:
    time, channel = draw_masks(MaskConfig(), torch.tensor([1]), 1, 128, generator())
    assert time.tolist() == [[False]]
    assert channel.shape == (1, 128)
    time, channel = draw_masks(MaskConfig(), torch.zeros(0, dtype=torch.int64), 5, 128, generator())
    assert time.shape == (0, 5)


def test_masks_depend_on_the_generator_alone() -> None:
    lens = torch.tensor([300, 200])
    first, again, other = (draw_masks(MaskConfig(), lens, 300, 128, generator(seed)) for seed in (1, 1, 2))
    assert torch.equal(first[0], again[0])
    assert torch.equal(first[1], again[1])
    assert not torch.equal(first[0], other[0])


def test_bins_fewer_than_a_span_are_not_masked() -> None:
    _, channel = draw_masks(MaskConfig(), torch.tensor([300]), 300, 16, generator())
    assert not channel.any()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"time_prob": 1.5}, "`time_prob` must be between 0 and 1, but is 1.5"),
        ({"channel_length": 0}, "`channel_length` must be at least 1, but is 0"),
        ({"min_time_masks": -1}, "`min_time_masks` must be at least 0, but is -1"),
        ({"mode": "frames"}, "`mode` must be span or block, but is frames"),
    ],
)
def test_mask_config_raises_config_error_when_out_of_bounds(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        MaskConfig(**settings)  # type: ignore[arg-type]
