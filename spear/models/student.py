"""The student: an encoder that sees a masked input while it trains."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from spear.models.base import Encoder
from spear.models.masking import MaskConfig, draw_masks
from spear.transfer import send
from spear.types import StudentOutput


class Student(nn.Module):
    """Masks the input and encodes it."""

    def __init__(self, encoder: Encoder, masking: MaskConfig) -> None:
        super().__init__()
        self.encoder = encoder
        self.masking = masking

    def forward(self, features: Tensor, lens: Tensor, generator: torch.Generator | None = None, host_lens: Tensor | None = None) -> StudentOutput:
        """Encode a padded batch; masked only in training mode and with a generator.

        Args:
            features: (N, T, F) at 100 Hz, what the encoder reads. lens: (N,) valid frames. generator: on the CPU, draws the masks.
            host_lens: `lens` on the CPU; without them, reading those of a GPU waits for it.
        Raises:
            DataError: an item is too short for the encoder.
        """
        if not self.training or generator is None:
            out = self.encoder(features, lens)
            return StudentOutput(out.features, out.lens, out.hidden_states, torch.zeros(out.features.shape[:2], device=features.device))
        mask_lens, num_frames, num_channels = self.encoder.mask_size(features, lens if host_lens is None else host_lens)
        time, channel = draw_masks(self.masking, mask_lens, num_frames, num_channels, generator)
        time, channel = send(time, features.device), send(channel, features.device)
        out = self.encoder.forward_masked(features, lens, time, channel)
        return StudentOutput(out.features, out.lens, out.hidden_states, self.encoder.masked_share(time, out.features.shape[1]))
