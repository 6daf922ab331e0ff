"""The Zipformer encoder of SPEAR."""

from spear.models.zipformer.config import StackConfig, ZipformerConfig
from spear.models.zipformer.encoder import Zipformer, ZipformerEncoder

__all__ = ["StackConfig", "Zipformer", "ZipformerConfig", "ZipformerEncoder"]
