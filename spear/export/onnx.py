"""Encoders for ONNX Runtime and as recorded torch programs: any batch, any length, in several precisions."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import logging
import math
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from spear.data.fbank import HOP
from spear.errors import CheckpointError, ConfigError
from spear.export.encoder import AudioEncoder
from spear.export.onnx_modules import RecordableEncoder, RecordableFbank, RecordableStep
from spear.files import void, write_atomic, write_json
from spear.models.base import Encoder
from spear.models.zipformer.encoder import ZipformerEncoder

logger = logging.getLogger(__name__)

OPSET = 20
ENCODER, AUDIO, STREAM, PROGRAM, PARITY = "encoder.onnx", "audio.onnx", "stream.onnx", "encoder.pt2", "parity.json"
EXAMPLE_FRAMES = 203
"""Log-mel frames of the example; recording needs two items, and a length that is special in no way."""
SMALL = 256
"""Weights with fewer values stay in float32."""
NEEDS = ("onnx", "onnxruntime", "onnxscript")


class Recorded(NamedTuple):
    """A module ready to be recorded: example inputs by name, which axes may vary, and names of the outputs."""

    module: nn.Module
    inputs: dict[str, Any]
    dynamic: dict[str, Any]
    outputs: list[str]


def require_onnx() -> None:
    """Check that the packages are there.

    Raises:
        ConfigError: one is not; names the extra to install.
    """
    missing = [name for name in NEEDS if importlib.util.find_spec(name) is None]
    if missing:
        raise ConfigError(f"`export.format` onnx needs the package {missing[0]}: install the extra [onnx], `pip install 'spear-audio[onnx]'`")


def min_frames(encoder: AudioEncoder) -> int:
    """Fewest log-mel frames that a recorded encoder takes: one chunk of a causal one, whose recording cannot shrink its chunks."""
    return max(encoder.encoder.min_fbank_frames, 2 * _chunk(encoder.encoder) + 7)


def min_program_frames(encoder: AudioEncoder) -> int:
    """As `min_frames` for a torch program, which holds for two frames of the coarsest stack and two chunks: torch records one apart."""
    network = encoder.encoder
    coarsest = max(stack.downsampling for stack in network.config.stacks()) if isinstance(network, ZipformerEncoder) else 1
    return max(network.min_fbank_frames, 2 * (max(coarsest, _chunk(network)) + 1) + 7)


def _chunk(network: Encoder) -> int:
    """Frames at 50 Hz that a recorded encoder hears together; 0 where it hears all."""
    return max(network.config.chunk_sizes[0], 0) if isinstance(network, ZipformerEncoder) and network.config.causal else 0


def record_encoder(encoder: AudioEncoder) -> ExportedProgram:
    """The encoder on log-mels as a torch program for any batch and length.

    Raises:
        CheckpointError: it reads no log-mels, or cannot be recorded.
    """
    return _record(encoder_parts(encoder))


def write_program(folder: Path, encoder: AudioEncoder) -> None:
    """Write ``encoder.pt2``, for `torch.export.load`: ``program.module()(fbank, fbank_lens)`` gives features and lens."""
    program = record_encoder(encoder)
    facts = {**metadata(encoder), "min_frames": str(min_program_frames(encoder))}

    def write(path: Path) -> None:
        buffer = io.BytesIO()
        torch.export.save(program, buffer, extra_files={"spear.txt": "\n".join(f"{key}={value}" for key, value in facts.items())})
        path.write_bytes(buffer.getvalue())

    write_atomic(folder / PROGRAM, write)


def write_onnx(folder: Path, encoder: AudioEncoder, precisions: Sequence[str] = ("fp32", "fp16", "int8")) -> list[str]:
    """Write the encoder on log-mels and on audio in each precision, and the streaming step of a causal one in float32.

    ``encoder.onnx``, ``encoder_fp16.onnx``, ``encoder_int8.onnx``, ``audio.onnx`` and so on, ``stream.onnx``; inputs and outputs are always
    float32 and int64. Each file's metadata says rate, width and bins.

    Returns:
        names of the files.
    Raises:
        ConfigError: a package is missing, or a precision is unknown. CheckpointError: the network reads no log-mels, or cannot be recorded.
    """
    require_onnx()
    import onnx

    unknown = [name for name in precisions if name not in PRECISIONS]
    if unknown:
        raise ConfigError(f"`export.precisions` must be of {', '.join(PRECISIONS)}, but has {unknown[0]!r}")
    facts, files = metadata(encoder), []
    whole = to_onnx(encoder_parts(encoder))
    front = to_onnx(_fbank_parts(encoder.encoder.num_mel_bins))
    for precision in precisions:
        changed = PRECISIONS[precision](whole)
        joined = onnx.compose.merge_models(
            onnx.compose.add_prefix(front, "front/", rename_inputs=False, rename_outputs=False),
            changed,
            io_map=[("fbank", "fbank"), ("fbank_lens", "fbank_lens")],
        )
        for name, model in ((ENCODER, changed), (AUDIO, joined)):
            files.append(file_name(name, precision))
            write_model(folder / files[-1], model, {**facts, "precision": precision})
    if isinstance(encoder.encoder, ZipformerEncoder) and encoder.encoder.config.causal and _streams(encoder.encoder):
        step = RecordableStep(encoder.encoder).eval()
        extra: dict[str, str | int] = {
            "step_frames": step.stream.step_frames,
            "hop_frames": step.stream.hop_frames,
            "states": ",".join(step.state_names),
        }
        write_model(folder / STREAM, to_onnx(_step_parts(step, encoder.encoder.num_mel_bins)), {**facts, **extra, "precision": "fp32"})
        files.append(STREAM)
    return files


def file_name(name: str, precision: str) -> str:
    """``encoder.onnx`` in float32, else ``encoder_int8.onnx`` and so on."""
    return name if precision == "fp32" else name.replace(".onnx", f"_{precision}.onnx")


def metadata(encoder: AudioEncoder) -> dict[str, str]:
    """What a client must know, as strings."""
    values = {
        "sample_rate": encoder.sample_rate,
        "frame_rate_hz": encoder.frame_rate_hz,
        "first_frame_s": round(encoder.first_frame_s, 6),
        "dim": encoder.dim,
        "num_mel_bins": encoder.encoder.num_mel_bins,
        "min_frames": min_frames(encoder),
    }
    return {key: str(value) for key, value in values.items()}


def to_onnx(parts: Recorded) -> Any:
    """The recorded module as an ONNX model in float32."""
    program = _record(parts)
    names: dict[str, Any] = {"input_names": _flat_names(parts.inputs), "output_names": parts.outputs}
    with _quiet():
        made = torch.onnx.export(program, dynamo=True, opset_version=OPSET, external_data=False, optimize=True, verbose=False, **names)
    assert made is not None
    return made.model_proto


def _record(parts: Recorded) -> ExportedProgram:
    try:
        with torch.no_grad(), _quiet():
            return torch.export.export(parts.module, (), parts.inputs, dynamic_shapes=parts.dynamic)
    except (torch._dynamo.exc.TorchDynamoException, RuntimeError, ValueError) as error:
        raise CheckpointError(f"the network cannot be recorded: {' '.join(str(error).split())[:300]}") from error


def encoder_parts(
    encoder: AudioEncoder,
    module: nn.Module | None = None,
    inputs: tuple[str, str] = ("fbank", "fbank_lens"),
    outputs: tuple[str, str] = ("features", "lens"),
) -> Recorded:
    """The encoder, or a `module` around it, with log-mels (N, T, F) and lens (N,) as `inputs`, any N and T.

    Raises:
        CheckpointError: the encoder reads no log-mels.
    """
    if encoder.encoder.reads != "fbank":
        raise CheckpointError(f"only an encoder that reads log-mels can be recorded, but this one reads {encoder.encoder.reads}")
    frames = max(EXAMPLE_FRAMES, min_frames(encoder) + 10)
    examples = (torch.zeros(2, frames, encoder.encoder.num_mel_bins), torch.tensor([frames, frames - 6]))
    dynamic = ({0: Dim.DYNAMIC, 1: Dim.DYNAMIC}, {0: Dim.DYNAMIC})
    module = RecordableEncoder(encoder.encoder) if module is None else module
    return Recorded(module.eval(), dict(zip(inputs, examples)), dict(zip(inputs, dynamic)), list(outputs))


def _fbank_parts(num_mel_bins: int) -> Recorded:
    samples = EXAMPLE_FRAMES * HOP + 11
    inputs = {"audio": torch.zeros(2, samples), "audio_lens": torch.tensor([samples, samples - 700])}
    dynamic = {"audio": {0: Dim.DYNAMIC, 1: Dim.DYNAMIC}, "audio_lens": {0: Dim.DYNAMIC}}
    return Recorded(RecordableFbank(num_mel_bins).eval(), inputs, dynamic, ["fbank", "fbank_lens"])


def _step_parts(step: RecordableStep, num_mel_bins: int) -> Recorded:
    frames, state = step.stream.step_frames, step.start(2)
    inputs = {"fbank": torch.zeros(2, frames, num_mel_bins), "fbank_lens": torch.tensor([frames, frames - 4]), "state": state}
    dynamic = {"fbank": {0: Dim.DYNAMIC}, "fbank_lens": {0: Dim.DYNAMIC}, "state": [{0: Dim.DYNAMIC} for _ in state]}
    return Recorded(step, inputs, dynamic, ["features", "lens", *(f"new_{name}" for name in step.state_names)])


def _flat_names(inputs: Mapping[str, Any]) -> list[str]:
    names: list[str] = []
    for name, value in inputs.items():
        names += [name] if isinstance(value, Tensor) else [f"{name}_{i}" for i in range(len(value))]
    return names


def _streams(encoder: ZipformerEncoder) -> bool:
    """Whether one chunk size and one left context are there to stream with."""
    sizes, contexts = encoder.config.chunk_sizes, encoder.config.left_contexts
    return len(sizes) == 1 and len(contexts) == 1 and sizes[0] > 0 and contexts[0] > 0


def _half(model: Any) -> Any:
    """Weights stored in float16 and brought to float32 when the file is loaded: half the size, the speed and the range of float32."""
    import numpy as np
    import onnx

    copy = type(model)()
    copy.CopyFrom(model)
    casts = []
    for weight in copy.graph.initializer:
        if weight.data_type != onnx.TensorProto.FLOAT or math.prod(weight.dims) < SMALL:
            continue
        name, values = weight.name, onnx.numpy_helper.to_array(weight)
        weight.CopyFrom(onnx.numpy_helper.from_array(values.astype(np.float16), f"{name}_fp16"))
        casts.append(onnx.helper.make_node("Cast", [f"{name}_fp16"], [name], name=f"{name}_cast", to=onnx.TensorProto.FLOAT))
    nodes = list(copy.graph.node)
    del copy.graph.node[:]
    copy.graph.node.extend([*casts, *nodes])
    return copy


def _int8(model: Any) -> Any:
    """Weights of linear layers as signed 8-bit numbers per channel, activations quantized as they come (dynamic quantization)."""
    import onnx
    from onnxruntime.quantization import QuantType, quantize_dynamic

    with tempfile.TemporaryDirectory() as place, _quiet():
        source, target = Path(place) / "fp32.onnx", Path(place) / "int8.onnx"
        copy = type(model)()
        copy.CopyFrom(model)
        del copy.graph.value_info[:]  # shapes the exporter noted, which the quantizer's own inference contradicts
        onnx.save(copy, source)
        quantize_dynamic(source, target, weight_type=QuantType.QInt8, per_channel=True, op_types_to_quantize=["MatMul", "Gemm"])
        return onnx.load(target)


PRECISIONS: dict[str, Callable[[Any], Any]] = {"fp32": lambda model: model, "fp16": _half, "int8": _int8}
"""What is done to the model in float32."""


def write_model(path: Path, model: Any, facts: Mapping[str, str | int]) -> None:
    """Write a model with metadata; one of more than 2 GB is refused by the format and said so."""
    import onnx

    copy = type(model)()
    copy.CopyFrom(model)
    del copy.metadata_props[:]
    copy.producer_name, copy.doc_string = "spear", ""
    onnx.helper.set_model_props(copy, {"model_type": "spear", "version": "1", **{key: str(value) for key, value in facts.items()}})
    if copy.ByteSize() > 2**31 - 1:
        raise CheckpointError(f"{path.name} would have {copy.ByteSize() / 2**30:.1f} GiB, but an ONNX file holds at most 2: export int8 or fp16 only")
    write_atomic(path, lambda temporary: void(temporary.write_bytes(copy.SerializeToString(deterministic=True))))


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep the exporters' talk out of the log; errors stay."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def write_parity(folder: Path, report: Mapping[str, Any]) -> None:
    """Write ``parity.json``."""
    write_json(folder / PARITY, dict(report))
