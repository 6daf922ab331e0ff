"""The Zipformer encoder of SPEAR."""

from spear.models.zipformer.config import StackConfig, ZipformerConfig
from spear.models.zipformer.encoder import Zipformer, ZipformerEncoder
from spear.models.zipformer.streaming import StreamState, ZipformerStream

__all__ = ["StackConfig", "StreamState", "Zipformer", "ZipformerConfig", "ZipformerEncoder", "ZipformerStream"]
