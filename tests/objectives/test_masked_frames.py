"""Masked prediction: which frames are masked, and which have a target, at the limits."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from spear.objectives.masked_prediction import MaskedPredictionConfig
from spear.types import IGNORE, TokenSpec
from tests.objectives.test_masked_prediction import Halve, batch, objective, output

SHARES = torch.tensor([0.0, 0.25, 0.49, 0.5, 0.75, 1.0])


def test_frames_count_as_masked_from_a_share_of_one_half() -> None:
    module, data = objective(alpha=1.0), batch(["speech"], t=6)
    out = output(1, 6)._replace(masked_share=SHARES[None])
    step = module(out, data)
    wanted = F.cross_entropy(module.heads["speech"](out.features[:, 3:]).flatten(0, 2), data.tokens["speech"][:, 3:].flatten(), reduction="sum") / 3
    torch.testing.assert_close(step.loss, 2 * wanted)
    assert step.metrics["masked_share"].tolist() == [3.0, 6.0]


def test_frames_masked_by_less_than_half_have_the_weight_of_unmasked_ones() -> None:
    module, data = objective(alpha=0.25), batch(["speech"] * 2)
    torch.testing.assert_close(module(output(masked=0.25), data).loss, module(output(masked=0.0), data).loss)


def test_frames_of_which_half_a_pair_of_tokens_is_missing_have_no_target() -> None:
    spec = TokenSpec(num_codebooks=2, codebook_size=8, frame_rate_hz=100.0, first_frame_s=0.005)
    torch.manual_seed(0)
    module = MaskedPredictionConfig(weights={"speech": {"fast": 1.0}}).build(Halve(), {"fast": spec})
    data, out = batch(["speech", "speech"], t=5), output(t=5)
    tokens = torch.randint(8, (2, 10, 2), generator=torch.Generator().manual_seed(3))
    tokens[0, 9:] = IGNORE  # frame 4 has its first token only
    tokens[1, 4] = IGNORE  # frame 2 has its second one only
    data.tokens, data.token_lens = {"fast": tokens}, {"fast": torch.tensor([9, 10])}
    step = module(out, data)
    frames, total = [[0, 1, 2, 3], [0, 1, 3, 4]], 0.0
    for n, own in enumerate(frames):
        logits = module.heads["fast"](out.features[n, own][None])[0].detach()  # (4, 2 * 2, 8)
        total += float(F.cross_entropy(logits.flatten(0, 1), tokens[n].view(5, 4)[own].flatten(), reduction="sum")) / 4
    assert step.count == 8
    assert step.metrics["loss/fast/speech"][1] == 8
    torch.testing.assert_close(step.loss.detach(), torch.tensor(total))
