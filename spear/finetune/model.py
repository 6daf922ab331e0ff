"""The network that is fine-tuned, and the folder it becomes: an exported encoder with a head beside it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import draccus
import torch
from torch import Tensor, nn

from spear.config import to_json
from spear.errors import CheckpointError, ConfigError
from spear.export.audio import encode_audio, encode_features
from spear.export.encoder import AudioEncoder, load_encoder, save_encoder
from spear.export.source import Source, read_source
from spear.export.weights import load_strictly
from spear.files import read_json, read_tensors, seed_from, write_json, write_tensors
from spear.finetune.config import StartConfig
from spear.finetune.layers import LayerMix, set_rates
from spear.finetune.lora import add_adapters
from spear.finetune.tasks.base import FinetuneTaskConfig, Head, Inventory, Prediction
from spear.models.base import Encoder, StudentConfig
from spear.models.masking import MaskConfig
from spear.models.student import Student
from spear.objectives import PretrainModule
from spear.types import Batch, EncoderOutput, StepOutput

HEAD, DESCRIPTION = "head.safetensors", "head.json"
VERSION = 1


class FinetuneModule(PretrainModule):
    """Student and head as the one module that the trainer optimises.

    Args:
        student: masks and encodes. head: owns the loss. frozen_steps: first updates in which the encoder gets no gradient.
    """

    objective: Head

    def __init__(self, student: Student, head: Head, frozen_steps: int = 0) -> None:
        super().__init__(student, head)
        self.frozen_steps = frozen_steps

    def forward(self, batch: Batch, generator: torch.Generator | None = None) -> StepOutput:
        """See PretrainModule."""
        frozen = self.training and self.step < self.frozen_steps
        with torch.set_grad_enabled(torch.is_grad_enabled() and not frozen):
            output = self.student(batch.features, batch.feature_lens, generator, batch.host_lens)
        result: StepOutput = self.objective(output, batch)
        return result

    @torch.no_grad()
    def predict(self, batch: Batch) -> list[Prediction]:
        """Answers to a batch, in its order; the module must be in eval mode."""
        output = self.student(batch.features, batch.feature_lens, None)
        frames, lens = self.objective.mix(output)
        return [Prediction(name, value) for name, value in zip(batch.ids, self.objective.predict(frames, lens))]


def starting_source(config: StartConfig, data: Path) -> Source | None:
    """Weights and network that `encoder.init_from` names; None where the recipe describes the network itself.

    Raises:
        CheckpointError: nothing is there, or it is no encoder. ConfigError: the recipe says neither.
    """
    if config.init_from is None:
        if config.student is None:
            raise ConfigError("`encoder.init_from` must name an encoder to start from, or `encoder.student` describe one, but neither is there")
        return None
    return read_source(next((path for path in (data / config.init_from, Path(config.init_from).expanduser()) if path.exists()), config.init_from))


def starting_encoder(config: StartConfig, source: Source | None, seed: int) -> tuple[Encoder, StudentConfig]:
    """The encoder before its first update, and its config."""
    student = config.student if source is None else source.student
    assert student is not None
    if config.schedule_offset is not None and hasattr(student, "schedule_offset"):
        student = replace(student, schedule_offset=config.schedule_offset)  # type: ignore[call-arg]
    torch.manual_seed(seed_from(seed, "student"))
    encoder = student.build()
    if source is not None and not config.random:
        load_strictly(encoder, {key: value.float() for key, value in source.encoder.items()}, source.name)
    return encoder, student


def make_module(
    config: StartConfig, encoder: Encoder, masking: MaskConfig, task: FinetuneTaskConfig, inventory: Inventory, seed: int
) -> FinetuneModule:
    """Wire encoder and head, with the adapters, the learning rates and the frozen start of `config`.

    Raises:
        ConfigError: no layer of the encoder is one that `encoder.lora` asks for.
    """
    if config.lora is not None:
        torch.manual_seed(seed_from(seed, "adapters"))
        add_adapters(encoder, config.lora)
    set_rates(encoder, config.lr_scale, config.layer_decay)
    mix = LayerMix(encoder.dim, encoder.layer_dims, config.layers)
    torch.manual_seed(seed_from(seed, "head"))
    return FinetuneModule(Student(encoder, masking), task.build(mix.dim, mix, inventory), config.frozen_steps)


class FinetunedModel(nn.Module):
    """A fine-tuned encoder with its head, as users meet it.

    Attributes:
        encoder: the encoder. head: answers from its frames. task: what it was trained for.
    """

    def __init__(self, encoder: AudioEncoder, head: Head, task: FinetuneTaskConfig, inventory: Inventory) -> None:
        super().__init__()
        self.encoder, self.head, self.task, self.inventory = encoder, head, task, inventory

    @torch.no_grad()
    def forward(self, audio: Tensor, lens: Tensor | None = None) -> list[Any]:
        """Answers to waveforms (N, S) or (S,), lens (N,) samples: texts, (K,) probabilities of ``inventory["classes"]``, or (E,) vectors.

        Raises:
            DataError: see `AudioEncoder`.
        """
        return self._answer(encode_audio(self.encoder.encoder, audio, lens))

    @torch.no_grad()
    def predict_features(self, features: Tensor, lens: Tensor | None = None) -> list[Any]:
        """As `forward`, from log-mels (N, T, F) at 100 Hz."""
        return self._answer(encode_features(self.encoder.encoder, features, lens))

    def _answer(self, output: EncoderOutput) -> list[Any]:
        return self.head.predict(*self.head.mix(output))


def save_finetuned(
    folder: Path, module: FinetuneModule, student: StudentConfig, task: FinetuneTaskConfig, inventory: Inventory, info: dict[str, Any]
) -> None:
    """Write an export folder of the encoder with ``head.safetensors`` and ``head.json`` beside it."""
    save_encoder(folder, module.student.encoder, student, info)
    head = module.objective
    write_tensors(folder / HEAD, head.state_dict())
    layers = "last" if head.mix.weights is None else "weighted"
    write_json(folder / DESCRIPTION, {"version": VERSION, "task": to_json(task, FinetuneTaskConfig), "layers": layers, "inventory": inventory})


def load_finetuned(folder: str | Path, device: str | torch.device = "cpu") -> FinetunedModel:
    """Load what `spear finetune` wrote to ``EXP/export``, in ``eval`` mode.

    Raises:
        CheckpointError: the folder holds no head, or one that does not fit.
    """
    folder = Path(folder)
    if not (folder / DESCRIPTION).exists():
        raise CheckpointError(f"{folder} has no {DESCRIPTION}: it holds no fine-tuned head; `spear.load_encoder` loads an encoder alone")
    found = read_json(folder / DESCRIPTION)
    if found.get("version") != VERSION:
        raise CheckpointError(f"{folder / DESCRIPTION} has version {found.get('version')}, but this program reads version {VERSION}")
    encoder = load_encoder(folder)
    task: FinetuneTaskConfig = draccus.decode(FinetuneTaskConfig, found["task"])
    mix = LayerMix(encoder.dim, encoder.encoder.layer_dims, found["layers"])
    head = task.build(mix.dim, mix, found["inventory"])
    load_strictly(head, read_tensors(folder / HEAD), str(folder / HEAD))
    return FinetunedModel(encoder, head, task, found["inventory"]).eval().to(device)
