"""The student around the encoder, and the prediction head."""

from __future__ import annotations

import pytest
import torch

from spear.models.base import share_under_frames
from spear.models.heads import CodebookHead
from spear.models.masking import MaskConfig, draw_masks
from spear.models.student import Student
from tests.models.parity import random_batch, tiny_config

MASKING = MaskConfig(channel_length=5)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_student_masks_only_in_training_with_a_generator() -> None:
    torch.manual_seed(0)
    student = Student(tiny_config().build(), MASKING)
    features, lens = random_batch([100, 57])
    assert float(student(features, lens).masked_share.max()) == 0.0
    assert float(student(features, lens, generator()).masked_share.max()) == 1.0
    student.eval()
    out = student(features, lens, generator())
    assert float(out.masked_share.max()) == 0.0
    assert torch.equal(out.features, student.encoder(features, lens).features)


@pytest.mark.parametrize("factor", [1, 2])
def test_student_reports_the_share_of_masked_input_under_each_frame(factor: int) -> None:
    student = Student(tiny_config(output_downsampling_factor=factor).build(), MASKING)
    features, lens = random_batch([101, 57])
    out = student(features, lens, generator(4))
    time, _ = draw_masks(MASKING, lens, 101, 20, generator(4))
    group = 2 * factor
    assert out.masked_share.shape == out.features.shape[:2]
    for t in range(out.features.shape[1]):
        expected = time[:, group * t + 4 : group * t + 4 + group].float()
        assert out.masked_share[:, t].tolist() == pytest.approx((expected.sum(1) / group).tolist())


def test_share_of_a_short_mask_counts_missing_frames_as_seen() -> None:
    assert share_under_frames(torch.ones(1, 7, dtype=torch.bool), 3, 50.0, 0.045).tolist() == [[1.0, 0.5, 0.0]]


def test_student_hides_frames_behind_mask_emb_and_bins_behind_zero() -> None:
    student = Student(tiny_config().build(), MASKING)
    seen: list[torch.Tensor] = []
    student.encoder.register_forward_pre_hook(lambda _, arguments: seen.append(arguments[0]))
    features, lens = random_batch([100, 57])
    student(features, lens, generator(1))
    time, channel = draw_masks(MASKING, lens, 100, 20, generator(1))
    assert time.any()
    assert channel.any()
    assert torch.equal(seen[0][time], student.encoder.mask_emb.expand(int(time.sum()), -1))
    assert torch.equal(seen[0][~time], features.masked_fill(channel[:, None], 0.0)[~time])


def test_student_teaches_mask_emb() -> None:
    student = Student(tiny_config().build(), MASKING)
    student(*random_batch([100, 57]), generator()).features.square().mean().backward()
    assert student.encoder.mask_emb.grad is not None
    assert float(student.encoder.mask_emb.grad.abs().max()) > 0.0


def test_codebook_head_predicts_every_codebook_in_float32() -> None:
    torch.manual_seed(0)
    head = CodebookHead(6, 3, 4)
    x = torch.randn(2, 5, 6)
    with torch.autocast("cpu", torch.bfloat16):
        logits = head(x)
    assert logits.shape == (2, 5, 3, 4)
    assert logits.dtype == torch.float32
    assert torch.allclose(head(x)[..., 2, 1], x @ head.proj.weight[2 * 4 + 1] + head.proj.bias[2 * 4 + 1], atol=1e-6)
