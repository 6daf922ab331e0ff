"""Encoders, the student around them, its masks and its heads."""

from spear.models.base import Encoder, StudentConfig
from spear.models.heads import CodebookHead
from spear.models.masking import MaskConfig, draw_masks
from spear.models.student import Student

__all__ = ["CodebookHead", "Encoder", "MaskConfig", "Student", "StudentConfig", "draw_masks"]
