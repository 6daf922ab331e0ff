"""The shape legend and the records that components hand to each other.

N batch items, S samples, T frames (say the rate), F mel bins, D width, C codebooks,
K entries of a codebook, L layers. ``lens`` are int64 (N,). ``padding_mask`` is True at padding;
``mask`` is True where the student must predict what it cannot see. Units are in the names:
``_s`` seconds, ``_hz``, ``_samples``, ``_frames``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from typing import Any, NamedTuple, TypeVar

from torch import Tensor

from spear.transfer import send

AnyBatch = TypeVar("AnyBatch", bound="Batch")

IGNORE = -100
"""Target value that carries no loss: padding, and teachers a cut's domain does not use. Never a failure."""

LOG_EPSILON = -23.025850929940457
"""ln(1e-10), the value that pads log-mel batches (facts of the released models)."""


class TeacherOutput(NamedTuple):
    """Frozen features of one layer of one teacher.

    features: (N, T, D) float32 at the teacher's rate; lens: (N,) int64 valid frames.
    """

    features: Tensor
    lens: Tensor


class CodecCodebooks(NamedTuple):
    """A neural codec's own residual codebooks, in the order of its codes.

    The codebooks form chains, each of which starts from the frame itself; within a chain every codebook codes what those before it leave over.
    A frame is rebuilt by adding up what all codebooks and chains give. E is the width within a chain, W that of an entry.

    entries: (C, K, W). starts: the first codebook of each of G chains, from 0 on. measure: how the nearest entry is found, "squared"
    or "distance" (Euclidean, rounded as EnCodec or as Mimi does) or "direction" (the angle).
    chain_in, chain_out: (G, E, D) and (G, D, E), into each chain and back; None: E = D.
    level_in, level_out: weight (C, W, E) and bias (C, W) into the space of each codebook, (C, E, W) and (C, E) back; None: W = E.
    """

    entries: Tensor
    starts: tuple[int, ...]
    measure: str
    chain_in: Tensor | None = None
    chain_out: Tensor | None = None
    level_in: tuple[Tensor, Tensor] | None = None
    level_out: tuple[Tensor, Tensor] | None = None


class EncoderOutput(NamedTuple):
    """What an encoder hears.

    features: (N, T, D) at the encoder's rate; lens: (N,) int64 valid frames;
    hidden_states: one (N, T_l, D_l) per layer, first layer first.
    """

    features: Tensor
    lens: Tensor
    hidden_states: tuple[Tensor, ...]


class StudentOutput(NamedTuple):
    """What the student makes of a masked input.

    features, lens, hidden_states: as in EncoderOutput. masked_share: (N, T) float in [0, 1], the share of
    the input frames under each student frame that was masked; all zeros where nothing was masked.
    """

    features: Tensor
    lens: Tensor
    hidden_states: tuple[Tensor, ...]
    masked_share: Tensor


@dataclass(frozen=True, slots=True)
class TokenSpec:
    """Everything a token store promises about its codes."""

    num_codebooks: int
    """C, parallel codes per frame."""
    codebook_size: int
    """K, entries per codebook; codes are 0..K-1."""
    frame_rate_hz: float
    """Token frames per second."""
    first_frame_s: float
    """Time of the first frame's centre in seconds."""
    teacher_fingerprint: str = ""
    quantizer_fingerprint: str = ""


@dataclass(frozen=True, slots=True)
class FrameSpec:
    """Everything a teacher that runs beside the student promises about its frames."""

    dim: int
    """D, width of a frame; several layers side by side make one frame."""
    num_parts: int
    """Layers side by side, each of width D / num_parts."""
    frame_rate_hz: float
    """Frames per second."""
    first_frame_s: float
    """Time of the first frame's centre in seconds."""


@dataclass(slots=True)
class Batch:
    """One batch of cuts, ready for a student.

    features: (N, T, F) float32 log-mels at 100 Hz padded with LOG_EPSILON; feature_lens: (N,) int64.
    tokens[teacher]: (N, T_teacher, C) int64 at that teacher's rate, IGNORE past its length and for cuts whose domain does
    not use that teacher; token_lens[teacher]: (N,) int64. targets[teacher]: (N, T_teacher, D) float32 frames of a teacher that runs
    beside the student, zero past target_lens[teacher] (N,) int64. ids, domains: one per item.
    second[teacher]: (N, T_teacher, C) int64, the other cut's token where two cuts sound (soft token mixing), else IGNORE; its
    probability is second_share (N,) float32 and that of the token in `tokens` the rest. Both are empty where nothing is mixed so.
    host_lens: feature_lens on the CPU, for what would wait for a GPU to read them; `to` fills it in.
    """

    ids: list[str]
    domains: list[str]
    features: Tensor
    feature_lens: Tensor
    seconds: float
    tokens: dict[str, Tensor] = field(default_factory=dict)
    token_lens: dict[str, Tensor] = field(default_factory=dict)
    targets: dict[str, Tensor] = field(default_factory=dict)
    target_lens: dict[str, Tensor] = field(default_factory=dict)
    second: dict[str, Tensor] = field(default_factory=dict)
    second_share: Tensor | None = None
    audio: Tensor | None = None
    audio_lens: Tensor | None = None
    host_lens: Tensor | None = None

    def to(self: AnyBatch, device: object) -> AnyBatch:
        """Copy to `device`, without waiting for it; all that is no tensor is shared."""
        moved = self._with(lambda x: send(x, device))
        if self.host_lens is None and self.feature_lens.device.type == "cpu":
            moved.host_lens = self.feature_lens
        return moved

    def pin_memory(self: AnyBatch) -> AnyBatch:
        """Copy to page-locked memory, from which `to` is fastest; torch's loaders call it."""
        return self._with(Tensor.pin_memory)

    def _with(self: AnyBatch, change: Callable[[Tensor], Tensor]) -> AnyBatch:
        """A batch with all tensors changed but `host_lens`."""
        changed: dict[str, Any] = {}
        for item in fields(self):
            value = getattr(self, item.name)
            if isinstance(value, Tensor) and item.name != "host_lens":
                changed[item.name] = change(value)
            elif isinstance(value, dict):
                changed[item.name] = {key: change(x) for key, x in value.items()}
        return replace(self, **changed)


class StepOutput(NamedTuple):
    """Result of an objective on one batch.

    loss: scalar, the SUM over this batch's targets (the trainer divides by the targets of all ranks).
    count: scalar, number of valid targets in that sum. metrics: name -> (2,) tensor [sum, count]; names are
    ``<quantity>/<teacher>/<domain>`` or a single word, e.g. ``loss/speech/audio``, ``accuracy/speech/speech``, ``masked_share``.
    """

    loss: Tensor
    count: Tensor  # type: ignore[assignment]  # shadows tuple.count on purpose
    metrics: dict[str, Tensor]
