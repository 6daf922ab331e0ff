"""A fine-tuned CTC model as files for sherpa-onnx, which runs it on phones, in browsers and behind servers without torch."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from spear.errors import CheckpointError
from spear.export.onnx import PRECISIONS, encoder_parts, file_name, metadata, require_onnx, to_onnx, write_model
from spear.export.onnx_modules import RecordableEncoder
from spear.export.onnx_parity import TOLERANCE, fbank_cases, session
from spear.files import make_folder, write_text
from spear.finetune.model import FinetunedModel
from spear.finetune.tasks.ctc import CTCHead
from spear.finetune.text import BLANK, Characters, Pieces, Tokenizer

MODEL, TOKENS = "model.onnx", "tokens.txt"
INPUTS, OUTPUTS = ("x", "x_lens"), ("log_probs", "log_probs_len")
WORD_START = "\u2581"
"""How a token list writes a space."""
BLANK_NAME = "<blk>"


class RecordableRecognizer(nn.Module):
    """Log-mels to log probabilities, under the names that sherpa-onnx calls them by."""

    def __init__(self, model: FinetunedModel) -> None:
        super().__init__()
        assert isinstance(model.head, CTCHead)
        self.encoder, self.head = RecordableEncoder(model.encoder.encoder), model.head

    def forward(self, x: Tensor, x_lens: Tensor) -> tuple[Tensor, Tensor]:
        """x (N, T, F) log-mels at 100 Hz, x_lens (N,) -> natural logarithms (N, T', V) and their lens (N,)."""
        features, lens = self.encoder(x, x_lens)
        return self.head.log_probs(features), lens


def write_recognizer(folder: Path, model: FinetunedModel, precisions: Sequence[str] = ("fp32", "int8")) -> dict[str, float]:
    """Write ``model.onnx``, ``model_int8.onnx`` and ``tokens.txt``, as sherpa-onnx takes them for its Zipformer CTC models.

    Returns:
        file -> largest difference of the log probabilities from torch, over random lengths and batch sizes.
    Raises:
        ConfigError: a package is missing. CheckpointError: the model is no recogniser of this kind, or the float32 file differs from torch.
    """
    require_onnx()
    if not isinstance(model.head, CTCHead) or model.head.mix.weights is not None:
        kind, layers = model.task.get_choice_name(type(model.task)), "last" if model.head.mix.weights is None else "weighted"
        raise CheckpointError(f"`spear sherpa` writes models of task ctc with `encoder.layers: last`, but this one is of task {kind} with `{layers}`")
    module = RecordableRecognizer(model).eval()
    whole = to_onnx(encoder_parts(model.encoder, module, INPUTS, OUTPUTS))
    facts: dict[str, str | int] = {**metadata(model.encoder), "model_type": "zipformer2_ctc", "model_author": "spear", "comment": "CTC"}
    facts["vocab_size"] = len(_tokens(model))
    make_folder(folder)
    write_text(folder / TOKENS, "".join(f"{name} {i}\n" for i, name in enumerate(_tokens(model))))
    found = {}
    for precision in precisions:
        name = file_name(MODEL, precision)
        write_model(folder / name, PRECISIONS[precision](whole), facts)
        found[name] = _difference(folder / name, model, module)
        if precision == "fp32" and not found[name] <= TOLERANCE:
            raise CheckpointError(f"{name} must equal torch up to {TOLERANCE:g}, but differs by {found[name]:.3g}")
    return found


def _tokens(model: FinetunedModel) -> list[str]:
    """Names of the symbols in their order; the blank is the first."""
    assert isinstance(model.head, CTCHead)
    assert BLANK == 0
    return [BLANK_NAME, *names(model.head.tokenizer)]


def names(tokenizer: Tokenizer) -> list[str]:
    """The symbols from 1 on, a space as sherpa-onnx reads it."""
    if isinstance(tokenizer, Characters):
        return [WORD_START if character == " " else character for character in tokenizer.characters]
    assert isinstance(tokenizer, Pieces)
    return tokenizer.pieces()


def _difference(path: Path, model: FinetunedModel, module: RecordableRecognizer) -> float:
    runtime: Any = session(path)
    largest = 0.0
    for x, lens in fbank_cases(model.encoder):
        with torch.no_grad():
            expected, expected_lens = module(x, lens)
        found, found_lens = runtime.run(list(OUTPUTS), {INPUTS[0]: x.numpy(), INPUTS[1]: lens.numpy()})
        if found_lens.tolist() != expected_lens.tolist():
            raise CheckpointError(f"{path.name} gives {found_lens.tolist()} frames where torch gives {expected_lens.tolist()}")
        for row, wanted, length in zip(found, expected.numpy(), expected_lens.tolist()):
            largest = max(largest, float(np.abs(row[:length] - wanted[:length]).max(initial=0.0)))
    return largest
