"""How far a recorded encoder is from torch: the same random inputs through both."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from spear.data.fbank import fbank_batch
from spear.errors import CheckpointError
from spear.export.encoder import AudioEncoder
from spear.export.onnx import AUDIO, ENCODER, PROGRAM, STREAM, file_name, min_frames, min_program_frames
from spear.export.onnx_modules import RecordableStep, flat
from spear.files import seed_from
from spear.models.zipformer.encoder import ZipformerEncoder
from spear.types import LOG_EPSILON

CASES, STEPS = 20, 12
TOLERANCE = 1e-4
"""Largest difference of float32 files, in units of the features' root mean square, or absolute where that is below one."""
LONGEST_FRAMES, LARGEST_BATCH = 600, 4
Run = Callable[[Tensor, Tensor], tuple[NDArray[Any], NDArray[Any]]]


class Difference(NamedTuple):
    """largest: of any value. rms: of the features in torch. relative: root mean square of the difference over that of the features."""

    largest: float
    rms: float
    relative: float

    def to_json(self) -> dict[str, float]:
        """Rounded to what is worth reading."""
        return {
            "largest_difference": float(f"{self.largest:.3g}"),
            "features_rms": float(f"{self.rms:.3g}"),
            "relative": float(f"{self.relative:.3g}"),
        }


def session(path: Path) -> Any:
    """An ONNX Runtime session on the CPU."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = max(torch.get_num_threads(), 1)
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def check_onnx(folder: Path, encoder: AudioEncoder, precisions: tuple[str, ...]) -> dict[str, Any]:
    """Compare every file of `write_onnx` with torch.

    Returns:
        file -> largest difference and what it was measured on.
    Raises:
        CheckpointError: a float32 file differs by more than `TOLERANCE`, or gives other lengths.
    """
    report: dict[str, Any] = {}
    for precision in precisions:
        for name, cases, names in ((ENCODER, fbank_cases(encoder), ("fbank", "fbank_lens")), (AUDIO, audio_cases(encoder), ("audio", "audio_lens"))):
            path = folder / file_name(name, precision)
            runtime = session(path)

            def run(x: Tensor, lens: Tensor, runtime: Any = runtime, names: tuple[str, str] = names) -> tuple[NDArray[Any], NDArray[Any]]:
                features, found = runtime.run(["features", "lens"], {names[0]: x.numpy(), names[1]: lens.numpy()})
                return features, found

            report[path.name] = _checked(path.name, compare(encoder, cases, run), exact=precision == "fp32")
            report[path.name]["cases"] = [list(x.shape[:2]) for x, _ in cases]
    if (folder / STREAM).exists():
        report[STREAM] = _checked(STREAM, compare_stream(folder / STREAM, encoder), exact=True)
        report[STREAM]["steps"] = STEPS
    return report


def check_program(folder: Path, encoder: AudioEncoder) -> dict[str, Any]:
    """As `check_onnx` for ``encoder.pt2``."""
    module = torch.export.load(folder / PROGRAM).module()

    def run(x: Tensor, lens: Tensor) -> tuple[NDArray[Any], NDArray[Any]]:
        with torch.no_grad():
            features, found = module(fbank=x, fbank_lens=lens)
        return features.numpy(), found.numpy()

    return {PROGRAM: _checked(PROGRAM, compare(encoder, fbank_cases(encoder, min_program_frames(encoder)), run), exact=True)}


def _checked(name: str, found: Difference, *, exact: bool) -> dict[str, Any]:
    if exact and not found.largest <= TOLERANCE * max(1.0, found.rms):
        raise CheckpointError(
            f"{name} must equal torch up to {TOLERANCE:g}, but differs by {found.largest:.3g} (features have an rms of {found.rms:.3g})"
        )
    return found.to_json()


def fbank_cases(encoder: AudioEncoder, least: int | None = None) -> list[tuple[Tensor, Tensor]]:
    """Random log-mels (N, T, F) of random batch sizes and lengths, the shortest possible among them, and their lengths (N,)."""
    generator = _generator("fbank")
    least = min_frames(encoder) if least is None else least
    cases = []
    for i in range(CASES):
        size = int(torch.randint(1, LARGEST_BATCH + 1, (), generator=generator))
        longest = least if i == 0 else int(torch.randint(least, LONGEST_FRAMES, (), generator=generator))
        lens = torch.randint(least, longest + 1, (size,), generator=generator)
        lens[0] = longest
        x = 4 * torch.randn(size, longest, encoder.encoder.num_mel_bins, generator=generator) - 8
        cases.append((x.masked_fill((torch.arange(longest) >= lens[:, None])[:, :, None], LOG_EPSILON), lens))
    return cases


def audio_cases(encoder: AudioEncoder) -> list[tuple[Tensor, Tensor]]:
    """Random audio (N, S) of several loudnesses, and its lengths (N,) in samples."""
    least, generator = min_frames(encoder) * 160, _generator("audio")
    cases = []
    for i in range(CASES):
        size = int(torch.randint(1, LARGEST_BATCH + 1, (), generator=generator))
        longest = least if i == 0 else int(torch.randint(least, LONGEST_FRAMES * 160, (), generator=generator))
        lens = torch.randint(least, longest + 1, (size,), generator=generator)
        lens[0] = longest
        loudness = 10 ** -(2 * torch.rand(size, 1, generator=generator))
        cases.append((0.3 * loudness * torch.randn(size, longest, generator=generator), lens))
    return cases


def compare(encoder: AudioEncoder, cases: list[tuple[Tensor, Tensor]], run: Run) -> Difference:
    """Largest difference between torch and `run` on the valid frames of all cases.

    Raises:
        CheckpointError: the lengths differ.
    """
    network, found = encoder.encoder, []
    for x, lens in cases:
        fbank, fbank_lens = (x, lens) if x.dim() == 3 else fbank_batch(x, lens, network.num_mel_bins)
        with torch.no_grad():
            expected = network(fbank, fbank_lens)
        features, out_lens = run(x, lens)
        if out_lens.tolist() != expected.lens.tolist():
            raise CheckpointError(f"the recorded encoder gives {out_lens.tolist()} frames where torch gives {expected.lens.tolist()}")
        for row, wanted, length in zip(features, expected.features.numpy(), expected.lens.tolist()):
            found.append((row[:length].astype(np.float64), wanted[:length].astype(np.float64)))
    return _difference(found)


def compare_stream(path: Path, encoder: AudioEncoder) -> Difference:
    """Largest difference between `ZipformerStream` and the recorded step, over features and all states, for a batch of three."""
    network = encoder.encoder
    assert isinstance(network, ZipformerEncoder)
    step, runtime, generator = RecordableStep(network), session(path), _generator("stream")
    state = step.stream.start(3)
    recorded = [value.numpy() for value in flat(state)]
    names = [item.name for item in runtime.get_inputs()][2:]
    lens, found = torch.full((3,), step.stream.step_frames), []
    for _ in range(STEPS):
        fbank = 4 * torch.randn(3, step.stream.step_frames, network.num_mel_bins, generator=generator) - 8
        out = step.stream.step(fbank, lens, state)
        features, _, *recorded = runtime.run(None, {"fbank": fbank.numpy(), "fbank_lens": lens.numpy(), **dict(zip(names, recorded))})
        state = out.state
        pairs = [(features, out.features), *zip(recorded, flat(state))]
        found += [(a.astype(np.float64), b.numpy().astype(np.float64)) for a, b in pairs]
    return _difference(found)


def _difference(pairs: list[tuple[NDArray[Any], NDArray[Any]]]) -> Difference:
    largest = max(float(np.abs(a - b).max(initial=0.0)) for a, b in pairs)
    squares = sum(float(np.square(b).sum()) for _, b in pairs)
    apart = sum(float(np.square(a - b).sum()) for a, b in pairs)
    count = sum(b.size for _, b in pairs)
    return Difference(largest, (squares / count) ** 0.5, (apart / max(squares, 1e-30)) ** 0.5)


def _generator(what: str) -> torch.Generator:
    return torch.Generator().manual_seed(seed_from("parity", what))
