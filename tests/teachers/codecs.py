"""Tiny random codecs of transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

KINDS = ("encodec", "mimi", "dac")


def make(kind: str, **settings: Any) -> Any:
    """A tiny random codec; what is in its codebooks is random, too."""
    import transformers as tf

    torch.manual_seed(3)
    small = {"num_filters": 4, "codebook_size": 16}
    if kind == "encodec":
        model: Any = tf.EncodecModel(tf.EncodecConfig(**{**small, "hidden_size": 16, "codebook_dim": 16, "num_lstm_layers": 1, **settings}))
    elif kind == "dac":
        sizes = {"encoder_hidden_size": 4, "decoder_hidden_size": 32, "n_codebooks": 2, "codebook_size": 16, "codebook_dim": 4}
        model = tf.DacModel(tf.DacConfig(**{**sizes, "sampling_rate": 16000, **settings}))
    else:
        transformer = {"num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 16, "intermediate_size": 32}
        quantizer = {"codebook_dim": 8, "num_quantizers": 4, "vector_quantization_hidden_dimension": 8, "upsample_groups": 32}
        model = tf.MimiModel(tf.MimiConfig(**{**small, **transformer, **quantizer, "hidden_size": 32, **settings}))
    for name, buffer in model.named_buffers():
        if name.endswith(("embed", "embed_sum")):  # codebooks, zero in a new model
            buffer.normal_(std=0.1)
        if name.endswith("cluster_usage"):
            buffer.uniform_(0.5, 2.0)
    return model.eval()


def save(kind: str, folder: Path, **settings: Any) -> Path:
    """Save one as a folder in the Hugging Face layout; returns the folder."""
    make(kind, **settings).save_pretrained(folder)
    return folder
