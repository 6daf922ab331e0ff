"""Quantizers: teacher frames to discrete codes and back."""

from __future__ import annotations

from pathlib import Path

from spear.files import read_json, read_tensors
from spear.quantizers.base import CONFIG, WEIGHTS, Quantizer, QuantizerConfig, load_folder
from spear.quantizers.codec import Codec
from spear.quantizers.dmel import DMel
from spear.quantizers.fsq import FSQ
from spear.quantizers.kmeans import KMeans
from spear.quantizers.mvq import MVQ
from spear.quantizers.product import Product
from spear.quantizers.random_projection import RandomProjection
from spear.quantizers.residual import Residual

__all__ = ["Codec", "DMel", "FSQ", "KMeans", "MVQ", "Product", "Quantizer", "QuantizerConfig", "RandomProjection", "Residual", "load_quantizer"]

KINDS: dict[str, type[Quantizer]] = {kind.kind: kind for kind in (Codec, DMel, FSQ, KMeans, MVQ, Product, RandomProjection, Residual)}


def load_quantizer(folder: str | Path) -> Quantizer:
    """The quantizer saved in `folder`.

    Raises:
        ArtifactError: a file is missing, damaged, or does not fit the other.
    """
    folder = Path(folder)
    config = read_json(folder / CONFIG)
    return load_folder(folder, KINDS, read_tensors(folder / WEIGHTS), config)
