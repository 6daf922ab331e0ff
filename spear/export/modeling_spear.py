"""Transformers model of an exported encoder, with the interface of the released SPEAR models."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

from spear.errors import CheckpointError
from spear.export.audio import by_length, check_audio, encode_audio, encode_features, read_batch
from spear.export.configuration_spear import SpearConfig
from spear.export.long_audio import OVERLAP_S, WINDOW_S, Loaded, encode_windows, join_pieces
from spear.types import EncoderOutput


@dataclass
class SpearOutput(ModelOutput):
    """What the encoder hears, as a dictionary with attributes.

    encoder_out: (N, T, D); encoder_out_lens: (N,) valid frames; hidden_states: one (N, T50, D_l) per layer, always at 50 Hz;
    intermediate_hidden_states: the same under the released code's name. The two are absent where they were not asked for.
    """

    encoder_out: Tensor | None = None
    encoder_out_lens: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    intermediate_hidden_states: tuple[Tensor, ...] | None = None

    @property
    def last_hidden_state(self) -> Tensor | None:
        """``encoder_out`` under the name that other Transformers encoders use."""
        return self.encoder_out


class SpearModel(PreTrainedModel):
    """SPEAR encoder (arXiv 2510.25955) from waveform to frames.

    Give float audio in [-1, 1] at 16 kHz; the log-mels are computed in float32 whatever the type of the weights.
    Attention is quadratic in time: give recordings of more than a minute or so to `encode_long`.
    """

    config_class = SpearConfig
    base_model_prefix = "spear"
    main_input_name = "audio"

    def __init__(self, config: SpearConfig) -> None:
        super().__init__(config)
        self.model = config.student().build()
        self.post_init()

    def _init_weights(self, module: Any) -> None:
        """Nothing: the encoder's modules initialise themselves, and `from_pretrained` refuses incomplete weights."""

    @classmethod
    def from_pretrained(cls, name: Any, *arguments: Any, **options: Any) -> Any:
        """Load weights; as `PreTrainedModel.from_pretrained`.

        Raises:
            CheckpointError: a weight is missing; it would otherwise be left with a random value.
        """
        wants_info = options.pop("output_loading_info", False)
        model, info = super().from_pretrained(name, *arguments, output_loading_info=True, **options)
        missing = sorted(info["missing_keys"])
        if missing:
            raise CheckpointError(f"{name} lacks {len(missing)} weights: {', '.join(missing[:3])}{', ...' if len(missing) > 3 else ''}")
        return (model, info) if wants_info else model

    def forward(
        self, audio: Any, audio_lens: Any = None, return_middle_layers: bool = True, *, batch_independent: bool = False, **_: Any
    ) -> SpearOutput:
        """Encode waveforms.

        Args:
            audio: (N, S) or (S,) float in [-1, 1] at 16 kHz. audio_lens: (N,) valid samples; None: all.
            return_middle_layers: whether to hand out the layers' hidden states.
            batch_independent: utterances of different lengths go through one after the other, so that the last frames of the shorter
            ones, which otherwise feel the padding a little, are what each utterance gives alone.
        Raises:
            DataError: the audio or its lengths break a rule; one line says which.
        """
        if not batch_independent:
            return _output(encode_audio(self.model, audio, audio_lens), return_middle_layers)
        audio, lens = check_audio(audio, audio_lens, self.device)
        return _output(by_length(lens, lambda rows, length: encode_audio(self.model, audio[rows, :length])), return_middle_layers)

    def encode_long(self, audio: Any, window_s: float = WINDOW_S, overlap_s: float = OVERLAP_S) -> SpearOutput:
        """Encode one recording of any length in overlapping windows, without gradients and without the layers' hidden states.

        Args:
            audio: (S,) float in [-1, 1] at 16 kHz. window_s, overlap_s: seconds; neighbouring windows meet in the middle of their overlap.
        Returns:
            encoder_out (1, T, D) and its length.
        """

        def encode(features: Tensor) -> EncoderOutput:
            return encode_features(self.model, features)._replace(hidden_states=())

        pieces = encode_windows(
            encode,
            Loaded(audio),
            num_mel_bins=self.model.num_mel_bins,
            frame_rate_hz=self.model.frame_rate_hz,
            grid=self.config.student().grid(),
            window_s=window_s,
            overlap_s=overlap_s,
            reads=self.model.reads,
        )
        return _output(join_pieces(pieces, hidden_states=False), return_middle_layers=False)

    def forward_features(self, features: Any, feature_lens: Any = None, return_middle_layers: bool = True) -> SpearOutput:
        """As `forward`, from log-mels (N, T, F) at 100 Hz."""
        return _output(encode_features(self.model, features, feature_lens), return_middle_layers)

    def load_audio(self, paths: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Read audio files of any rate and number of channels: (N, S) float32 mono at 16 kHz, zero-padded, and (N,) lengths."""
        return read_batch(paths, self.config.sample_rate)


def _output(output: EncoderOutput, return_middle_layers: bool) -> SpearOutput:
    layers = output.hidden_states if return_middle_layers else None
    return SpearOutput(encoder_out=output.features, encoder_out_lens=output.lens, hidden_states=layers, intermediate_hidden_states=layers)
