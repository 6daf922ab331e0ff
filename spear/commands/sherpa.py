"""``spear sherpa``: a fine-tuned CTC model as a folder that sherpa-onnx loads."""

from __future__ import annotations

import logging
from pathlib import Path

from spear.finetune import load_finetuned
from spear.finetune.recognizer import write_recognizer

logger = logging.getLogger(__name__)


def write_sherpa(export: Path, out: Path) -> None:
    """Write ``model.onnx``, ``model_int8.onnx`` and ``tokens.txt``, and say how far they are from torch.

    Raises:
        ConfigError: a package is missing. CheckpointError: `export` holds no CTC model, or its recording differs from torch.
    """
    found = write_recognizer(out, load_finetuned(export))
    logger.info("sherpa: %s -> %s", ", ".join(f"{name} within {value:.2g} of torch" for name, value in found.items()), out)
