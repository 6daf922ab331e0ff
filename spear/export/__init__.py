"""Trained encoders as model folders: saving, loading, the Hugging Face layout."""

from spear.export.encoder import AudioEncoder, load_encoder, save_encoder

__all__ = ["AudioEncoder", "load_encoder", "save_encoder"]
