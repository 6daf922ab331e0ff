"""Trained encoders as model folders: saving, loading, the Hugging Face layout, and icefall's."""

from spear.export.encoder import AudioEncoder, load_encoder, save_encoder
from spear.export.icefall import save_icefall

__all__ = ["AudioEncoder", "load_encoder", "save_encoder", "save_icefall"]
