"""The upstream that S3PRL makes from an export; the file also works as ``expert.py`` of a Hugging Face repository for S3PRL.

Source: the interface of S3PRL 0.4 (github.com/s3prl/s3prl, ``s3prl/upstream/example``); SUPERB is arXiv:2105.01051.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from spear.errors import ConfigError
from spear.evaluation.frozen import named_export
from spear.export.encoder import load_encoder
from spear.models.zipformer.encoder import fit_channels


class UpstreamExpert(nn.Module):
    """Waveforms to hidden states of one width and one rate.

    Attributes: encoder, width (D of all states: the widest layer's), num_states (layers and output).
    Args:
        ckpt: export folder, Hugging Face id or checkpoint; empty: what the environment variable ``SPEAR_EXPORT`` says.
        model_config: must be empty, an export holds its own. options: what the harness hands to every upstream; not read.
    Raises:
        ConfigError: no export is named, or a config is. CheckpointError: it is no encoder.
    """

    def __init__(self, ckpt: str | None = None, model_config: str | None = None, **options: Any) -> None:
        super().__init__()
        if model_config:
            raise ConfigError(f"`model_config` must be empty, but is {model_config!r}: an export holds its own config")
        self.encoder = load_encoder(named_export(str(ckpt or "")))
        self.width = max(self.encoder.dim, *self.encoder.encoder.layer_dims)
        self.num_states = self.encoder.num_layers + 1

    def get_downsample_rates(self, key: str) -> int:
        """Samples from frame to frame, of every `key` the same."""
        return round(self.encoder.sample_rate / self.encoder.frame_rate_hz)

    def forward(self, wavs: Sequence[Tensor]) -> dict[str, Any]:
        """Encode a batch.

        Args:
            wavs: N waveforms (S_i,) floating in [-1, 1] at 16 kHz.
        Returns:
            ``hidden_states``: every layer and then the output, each (N, T, D) with D = `width`; narrower ones are completed by zero
            channels, which add nothing in a weighted sum. ``last_hidden_state``: the output (N, T, D'). T is that of the longest
            waveform; what a shorter one has past its end carries no meaning and S3PRL cuts it off.
        Raises:
            DataError: wrong type, shape or range, or a value that is not finite.
        """
        lens = torch.tensor([len(wav) for wav in wavs])
        output = self.encoder(nn.utils.rnn.pad_sequence(list(wavs), batch_first=True), lens)
        states = [fit_channels(state, self.width) for state in (*output.hidden_states, output.features)]
        return {"hidden_states": states, "last_hidden_state": output.features}
