"""What every quantizer is: teacher frames to codes and back, saved as weights beside their description."""

from __future__ import annotations

import abc
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from spear.errors import ArtifactError, DataError
from spear.files import sha256, sha256_json, write_json, write_tensors
from spear.quantizers.frame_source import FrameSource
from spear.quantizers.normalize import Normalizer
from spear.registry import Registry
from spear.types import CodecCodebooks

WEIGHTS, CONFIG = "quantizer.safetensors", "config.json"
FORMAT_VERSION = 1


class Quantizer(nn.Module, abc.ABC):
    """Codes of C codebooks with K entries each for frames of width D.

    Frames go in and come out as the teacher makes them: normalisation, where there is one, happens inside.

    Attributes:
        dim: D. num_codebooks: C. codebook_size: K. normalizer: channel normalisation or None.
    """

    kind: ClassVar[str]

    def __init__(self, dim: int, num_codebooks: int, codebook_size: int, normalizer: Normalizer | None) -> None:
        super().__init__()
        self.dim, self.num_codebooks, self.codebook_size = dim, num_codebooks, codebook_size
        self.normalizer = normalizer

    @property
    def bits_per_frame(self) -> float:
        """Bits that one frame's codes can carry: C * log2 K."""
        return self.num_codebooks * math.log2(self.codebook_size)

    @property
    def code_dtype(self) -> torch.dtype:
        """Smallest integer type that holds K - 1: uint8, int16 or int32."""
        if self.codebook_size <= 256:
            return torch.uint8
        return torch.int16 if self.codebook_size <= 2**15 else torch.int32

    @abc.abstractmethod
    def encode(self, frames: Tensor) -> Tensor:
        """Codes (..., C) of `code_dtype` for frames (..., D); a frame's codes do not depend on its neighbours.

        Raises:
            DataError: the width is not D, or a value is not finite.
        """

    @abc.abstractmethod
    def reconstruct(self, codes: Tensor) -> Tensor:
        """Normalised frames (M, D) float32 for int64 codes (M, C)."""

    @abc.abstractmethod
    def settings(self) -> dict[str, Any]:
        """JSON values beyond the sizes that `from_state` needs."""

    @classmethod
    @abc.abstractmethod
    def from_state(cls, config: dict[str, Any], state: dict[str, Tensor]) -> Quantizer:
        """Build from a saved description and its tensors; KeyError, ValueError or RuntimeError where they do not fit."""

    def decode(self, codes: Tensor) -> Tensor:
        """Frames (..., D) float32, as the teacher would make them, for integer codes (..., C).

        Raises:
            DataError: the last size is not C, or a code is outside 0..K-1.
        """
        if codes.dim() == 0 or codes.shape[-1] != self.num_codebooks:
            raise DataError(f"codes must have {self.num_codebooks} codebooks in their last dimension, but have shape {tuple(codes.shape)}")
        flat = codes.reshape(-1, self.num_codebooks).long().to(self.device)
        if flat.numel() and not (int(flat.min()) >= 0 and int(flat.max()) < self.codebook_size):
            raise DataError(f"codes must be in 0..{self.codebook_size - 1}, but reach from {int(flat.min())} to {int(flat.max())}")
        frames = self.reconstruct(flat)
        if self.normalizer is not None:
            frames = self.normalizer.invert(frames)
        return frames.view(*codes.shape[:-1], self.dim)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        found: torch.device = next(iter(self.state_dict().values())).device
        return found

    def normalize(self, frames: Tensor) -> Tensor:
        """Checked, normalised frames (M, D) float32 on the quantizer's device, from frames (..., D).

        Raises:
            DataError: the width is not D, or a value is not finite.
        """
        if frames.dim() == 0 or frames.shape[-1] != self.dim:
            raise DataError(f"frames must have {self.dim} channels, but have shape {tuple(frames.shape)}")
        flat = frames.detach().reshape(-1, self.dim).to(self.device, torch.float32)
        if not flat.isfinite().all():
            raise DataError("frames have non-finite values and cannot be quantized", cause="not_finite")
        return flat if self.normalizer is None else self.normalizer.apply_to(flat)

    def description(self) -> dict[str, Any]:
        """The content of ``config.json``."""
        return {
            "type": self.kind,
            "version": FORMAT_VERSION,
            "dim": self.dim,
            "num_codebooks": self.num_codebooks,
            "codebook_size": self.codebook_size,
            "normalize": self.normalizer is not None,
            **self.settings(),
        }

    def fingerprint(self) -> str:
        """SHA-256 over the description and every weight, wherever the quantizer is."""
        weights = {name: _hash(tensor) for name, tensor in sorted(self.state_dict().items())}
        return sha256_json({"description": self.description(), "weights": weights})

    def save(self, folder: Path) -> None:
        """Write ``quantizer.safetensors`` and ``config.json`` into `folder`."""
        write_tensors(folder / WEIGHTS, self.state_dict())
        write_json(folder / CONFIG, {**self.description(), "fingerprint": self.fingerprint()})


def _hash(tensor: Tensor) -> list[Any]:
    array = tensor.detach().cpu().contiguous().numpy()
    return [str(tensor.dtype), list(tensor.shape), sha256(array.tobytes())]


def take_normalizer(config: dict[str, Any], state: dict[str, Tensor]) -> Normalizer | None:
    """The saved normaliser, None where the description says there is none."""
    return Normalizer(state["normalizer.mean"], state["normalizer.std"]) if config["normalize"] else None


def check_fit_frames(train: Tensor, heldout: Tensor) -> None:
    """Frames to fit on must be (M, D) and (H, D), finite, at least one each.

    Raises:
        DataError: they are not.
    """
    _check_frames("training", train, int(train.shape[-1]))
    check_heldout(heldout, int(train.shape[-1]))


def check_heldout(heldout: Tensor, dim: int) -> None:
    """Held-out frames must be (H, D), finite, at least one.

    Raises:
        DataError: they are not.
    """
    _check_frames("held-out", heldout, dim)


def _check_frames(name: str, frames: Tensor, dim: int) -> None:
    if frames.dim() != 2 or frames.shape[1] != dim:
        raise DataError(f"{name} frames must have shape (frames, {dim}), but have {tuple(frames.shape)}")
    if not len(frames):
        raise DataError(f"a quantizer needs {name} frames, but there are 0", cause="empty")
    if not frames.isfinite().all():
        raise DataError(f"{name} frames have non-finite values", cause="not_finite")


def load_folder(folder: Path, kinds: dict[str, type[Quantizer]], state: dict[str, Tensor], config: Any) -> Quantizer:
    """Build the quantizer that `config` and `state`, read from `folder`, describe.

    Raises:
        ArtifactError: an unknown kind or version, tensors that do not fit, or weights other than those saved together.
    """
    if not isinstance(config, dict) or config.get("type") not in kinds:
        raise ArtifactError(f"{folder / CONFIG} must have `type` {' or '.join(sorted(kinds))}")
    if config.get("version") != FORMAT_VERSION:
        raise ArtifactError(f"{folder / CONFIG} must have `version` {FORMAT_VERSION}, but has {config.get('version')}")
    try:
        quantizer = kinds[config["type"]].from_state(config, state)
    except (KeyError, ValueError, TypeError, RuntimeError) as error:
        line = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ArtifactError(f"{folder / WEIGHTS} does not fit {CONFIG} beside it: {line}") from error
    if quantizer.fingerprint() != config.get("fingerprint"):
        raise ArtifactError(f"{folder / WEIGHTS} is not the file that {CONFIG} beside it was saved with: fingerprints differ")
    return quantizer


@dataclass(frozen=True, kw_only=True, slots=True)
class QuantizerConfig(Registry):
    """Family of quantizers, such as ``type: mvq`` and ``type: kmeans``."""

    TABLE: ClassVar[dict[str, str]] = {
        "mvq": "spear.quantizers.mvq_fit:MVQConfig",
        "kmeans": "spear.quantizers.kmeans:KMeansConfig",
        "residual": "spear.quantizers.residual:ResidualConfig",
        "product": "spear.quantizers.product:ProductConfig",
        "random_projection": "spear.quantizers.random_projection:RandomProjectionConfig",
        "fsq": "spear.quantizers.fsq:FSQConfig",
        "dmel": "spear.quantizers.dmel:DMelConfig",
        "codec": "spear.quantizers.codec:CodecConfig",
    }

    def knowing(self, codebooks: Callable[[], CodecCodebooks]) -> QuantizerConfig:
        """This config once its teacher is known, for `sizes` and the fits; most kinds ask nothing of a teacher and stay as they are.

        Args:
            codebooks: gives the teacher's own codebooks, ConfigError where it has none; called only by kinds that take them.
        """
        del codebooks
        return self

    def sizes(self, dim: int) -> tuple[int, int]:
        """Codebooks C and entries K of what `fit` makes of frames of width `dim`, known before there are frames.

        Raises:
            ConfigError: such frames cannot be quantized with these settings.
        """
        del dim
        return int(getattr(self, "num_codebooks", 1)), int(getattr(self, "codebook_size", 256))

    @abc.abstractmethod
    def fit(self, train: Tensor, heldout: Tensor, *, seed: int, checkpoint: Path | None = None) -> Quantizer:
        """Fit on teacher frames.

        Args:
            train: (M, D) float32. heldout: (H, D) float32, never trained on.
            seed: decides every random choice; the same frames and seed give the same bytes.
            checkpoint: file that a long fit saves its state in and resumes from; None: no resuming.
        Raises:
            DataError: too few frames, or non-finite ones.
        """

    def fit_source(self, source: FrameSource, heldout: Tensor, *, seed: int, checkpoint: Path | None = None) -> Quantizer:
        """Fit on the frames of `source`, which may lie on disk and be shared with other processes; all return the same.

        Kinds that do not say otherwise read all frames into memory, in every process.
        """
        saved = checkpoint if source.rank == 0 else None
        return self.fit(source.read(0, len(source)), heldout, seed=seed, checkpoint=saved)
