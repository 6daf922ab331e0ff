"""`spear sherpa`, from the command line to the files."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch

from spear.cli import main
from spear.export.onnx_parity import session
from spear.finetune import load_finetuned
from spear.finetune.config import StartConfig
from spear.finetune.model import make_module, save_finetuned, starting_encoder
from spear.finetune.tasks.base import FinetuneTaskConfig
from spear.finetune.tasks.ctc import CTCConfig
from spear.finetune.tasks.rnnt import RNNTConfig
from spear.models.masking import MaskConfig
from tests.export.tiny import tiny_config, tone


def finetuned(folder: Path, task: FinetuneTaskConfig) -> Path:
    """The export folder of a fine-tuning that has not begun."""
    start, inventory = StartConfig(student=tiny_config()), task.inventory(["one two three"])
    encoder, student = starting_encoder(start, None, 0)
    save_finetuned(folder, make_module(start, encoder, MaskConfig(), task, inventory, 0).eval(), student, task, inventory, {"name": "small"})
    return folder


def test_sherpa_command_refuses_a_transducer_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    export = finetuned(tmp_path / "export", RNNTConfig(predictor_dim=8, joint_dim=8))
    assert main(["sherpa", str(export), str(tmp_path / "out")]) == 1
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line == "spear: error: `spear sherpa` writes models of task ctc with `encoder.layers: last`, but this one is of task rnnt with `last`"
    assert not (tmp_path / "out").exists()


def test_sherpa_command_says_when_there_is_no_export(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["sherpa", str(tmp_path / "export"), str(tmp_path / "out")]) == 1
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert "has no head.json: it holds no fine-tuned head" in line


@pytest.mark.slow
def test_sherpa_command_writes_files_that_recognise_as_torch_does(tmp_path: Path) -> None:
    export, out = finetuned(tmp_path / "export", CTCConfig()), tmp_path / "out"
    assert main(["sherpa", str(export), str(out)]) == 0
    assert sorted(path.name for path in out.iterdir()) == ["model.onnx", "model_int8.onnx", "tokens.txt"]
    model, features = load_finetuned(export), np.random.default_rng(0).standard_normal((1, 90, 128)).astype(np.float32)
    log_probs, lens = session(out / "model.onnx").run(None, {"x": features, "x_lens": np.array([90])})
    tokens = [line.split(" ")[0] for line in (out / "tokens.txt").read_text().splitlines()]
    best = log_probs[0, : lens[0]].argmax(axis=1)
    text = "".join(tokens[v].replace("\u2581", " ") for v, before in zip(best, [0, *best]) if v not in (0, before))
    (wanted,) = model.predict_features(torch.from_numpy(features))
    assert text == wanted
    if importlib.util.find_spec("sherpa_onnx") is None:
        pytest.skip("sherpa-onnx is not installed; the files gave the text of torch in ONNX Runtime")
    import sherpa_onnx

    recognizer = sherpa_onnx.OfflineRecognizer.from_zipformer_ctc(str(out / "model.onnx"), str(out / "tokens.txt"), feature_dim=128, num_threads=1)
    stream = recognizer.create_stream()
    stream.accept_waveform(16_000, tone(16_000).numpy())
    recognizer.decode_stream(stream)
    assert stream.result.text.split() == model(tone(16_000))[0].split()
