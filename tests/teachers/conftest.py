"""Tiny random models of every family, saved as Hugging Face folders."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from spear.teachers.base import Teacher
from spear.teachers.huggingface import HuggingFaceConfig

SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
CONVS = {**SMALL, "num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 4, "conv_dim": (16,) * 7}
LAYER_NORM = {"feat_extract_norm": "layer", "do_stable_layer_norm": True}
FAMILIES = (
    "wavlm_group",
    "wavlm_layer",
    "hubert_layer",
    "hubert_group",
    "wav2vec2_layer",
    "wav2vec2_group",
    "data2vec",
    "unispeech_sat",
    "unispeech",
    "wav2vec2_conformer",
    "w2v_bert",
    "whisper",
    "whisper_encoder",
    "ast",
)


def make(family: str) -> tuple[Any, Any]:
    """A tiny random model and its feature extractor."""
    import transformers as tf

    torch.manual_seed(3)
    waveform = {
        "wavlm_group": lambda: tf.WavLMModel(tf.WavLMConfig(**CONVS)),
        "wavlm_layer": lambda: tf.WavLMModel(tf.WavLMConfig(**CONVS, **LAYER_NORM)),
        "hubert_group": lambda: tf.HubertModel(tf.HubertConfig(**CONVS)),
        "hubert_layer": lambda: tf.HubertModel(tf.HubertConfig(**CONVS, **LAYER_NORM)),
        "wav2vec2_group": lambda: tf.Wav2Vec2Model(tf.Wav2Vec2Config(**CONVS)),
        "wav2vec2_layer": lambda: tf.Wav2Vec2Model(tf.Wav2Vec2Config(**CONVS, **LAYER_NORM)),
        "data2vec": lambda: tf.Data2VecAudioModel(tf.Data2VecAudioConfig(**{**CONVS, "num_conv_pos_embeddings": 2})),
        "unispeech": lambda: tf.UniSpeechModel(tf.UniSpeechConfig(**CONVS, **LAYER_NORM)),
        "unispeech_sat": lambda: tf.UniSpeechSatModel(tf.UniSpeechSatConfig(**CONVS, **LAYER_NORM)),
        "wav2vec2_conformer": lambda: tf.Wav2Vec2ConformerModel(tf.Wav2Vec2ConformerConfig(**CONVS, feat_extract_norm="layer")),
    }
    if family in waveform:
        return waveform[family](), tf.Wav2Vec2FeatureExtractor(do_normalize=True, return_attention_mask=True)
    if family == "w2v_bert":
        return tf.Wav2Vec2BertModel(tf.Wav2Vec2BertConfig(**SMALL, feature_projection_input_dim=160)), tf.SeamlessM4TFeatureExtractor()
    if family == "ast":
        return tf.ASTModel(tf.ASTConfig(**SMALL, max_length=256)), tf.ASTFeatureExtractor(max_length=256)
    config = tf.WhisperConfig(
        d_model=32,
        encoder_layers=2,
        encoder_attention_heads=2,
        decoder_layers=1,
        decoder_attention_heads=2,
        encoder_ffn_dim=64,
        decoder_ffn_dim=64,
        max_source_positions=100,
        num_mel_bins=80,
        vocab_size=10,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=1,
    )
    model = tf.WhisperModel(config)
    return (model.get_encoder() if family == "whisper_encoder" else model), tf.WhisperFeatureExtractor(chunk_length=2)


@pytest.fixture(scope="session")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """family -> folder with the tiny model; made once."""
    root = tmp_path_factory.mktemp("models")

    def folder(family: str) -> Path:
        path = root / family
        if not path.exists():
            model, extractor = make(family)
            model.save_pretrained(path)
            extractor.save_pretrained(path)
        return path

    return folder


@pytest.fixture(scope="session")
def teacher(saved: Callable[[str], Path]) -> Callable[..., Teacher]:
    """(family, settings) -> teacher."""

    def build(family: str, **settings: Any) -> Teacher:
        return HuggingFaceConfig(model=str(saved(family)), **settings).build()

    return build


def noise(samples: int, seed: int = 0) -> torch.Tensor:
    """(S,) of seeded noise with a level that changes over time and an offset."""
    values = torch.randn(samples, generator=torch.Generator().manual_seed(seed))
    return 0.1 * values * torch.linspace(0.2, 1.5, samples) + 0.01
