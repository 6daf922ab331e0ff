"""A fine-tuned CTC model as sherpa-onnx wants it."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch

from spear.data.fbank import fbank
from spear.errors import CheckpointError
from spear.export.onnx_parity import session
from spear.finetune.layers import LayerMix
from spear.finetune.model import FinetunedModel
from spear.finetune.recognizer import RecordableRecognizer, names, write_recognizer
from spear.finetune.tasks.base import FinetuneTaskConfig
from spear.finetune.tasks.ctc import CTCConfig
from spear.finetune.tasks.tagging import TaggingConfig
from spear.finetune.text import fit_characters, fit_pieces
from tests.export.tiny import tiny_encoder, tone

TEXT = "one two three"


def model(task: FinetuneTaskConfig, labels: list[str]) -> FinetunedModel:
    encoder = tiny_encoder()
    inventory = task.inventory(labels)
    torch.manual_seed(0)
    head = task.build(encoder.dim, LayerMix(encoder.dim, encoder.encoder.layer_dims, "last"), inventory)
    return FinetunedModel(encoder, head, task, inventory).eval()


def test_names_write_a_space_as_the_begin_of_a_word() -> None:
    assert names(fit_characters(["b a"])) == ["\u2581", "a", "b"]


def test_names_of_pieces_have_a_row_for_every_symbol() -> None:
    pytest.importorskip("sentencepiece", reason="the extra [finetune]")
    tokenizer = fit_pieces([TEXT, "two one", "three one two"], 20)
    found = names(tokenizer)
    assert len(found) == tokenizer.size - 1
    symbols = tokenizer.encode("two")
    assert symbols is not None
    assert "".join(found[symbol - 1] for symbol in symbols) == "\u2581two"


def test_recordable_recognizer_gives_the_log_probabilities_of_the_head() -> None:
    found = model(CTCConfig(), [TEXT])
    log_mels = fbank(tone(16_000))[None]
    with torch.no_grad():
        log_probs, lens = RecordableRecognizer(found)(log_mels, torch.tensor([log_mels.shape[1]]))
        wanted = found.head.log_probs(found.encoder(tone(16_000)).features)  # type: ignore[operator]
    assert lens.tolist() == [log_probs.shape[1]]
    torch.testing.assert_close(log_probs, wanted, atol=1e-4, rtol=0)


def test_write_recognizer_refuses_other_tasks(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="writes models of task ctc with `encoder.layers: last`, but this one is of task tagging with `last`"):
        write_recognizer(tmp_path, model(TaggingConfig(), ["a;b", "c"]))


@pytest.mark.slow
def test_write_recognizer_files_are_those_of_sherpa_onnx(tmp_path: Path) -> None:
    found = model(CTCConfig(), [TEXT])
    differences = write_recognizer(tmp_path, found)
    assert differences["model.onnx"] <= 1e-4
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.onnx", "model_int8.onnx", "tokens.txt"]
    lines = (tmp_path / "tokens.txt").read_text().splitlines()
    assert lines[:3] == ["<blk> 0", "\u2581 1", "e 2"]
    runtime = session(tmp_path / "model.onnx")
    assert [item.name for item in runtime.get_inputs()] == ["x", "x_lens"]
    assert [item.name for item in runtime.get_outputs()] == ["log_probs", "log_probs_len"]
    facts = runtime.get_modelmeta().custom_metadata_map
    assert (facts["model_type"], facts["vocab_size"]) == ("zipformer2_ctc", str(len(lines)))
    log_probs, _ = runtime.run(None, {"x": fbank(tone(16_000))[None].numpy(), "x_lens": np.array([100])})
    np.testing.assert_allclose(np.exp(log_probs).sum(axis=-1), 1.0, atol=1e-4)
    if importlib.util.find_spec("sherpa_onnx") is None:
        pytest.skip("sherpa-onnx is not installed; the files are as it wants them")
    import sherpa_onnx

    files = {"model": str(tmp_path / "model.onnx"), "tokens": str(tmp_path / "tokens.txt")}
    recognizer = sherpa_onnx.OfflineRecognizer.from_zipformer_ctc(**files, feature_dim=128, num_threads=1)
    stream = recognizer.create_stream()
    stream.accept_waveform(16_000, tone(16_000).numpy())
    recognizer.decode_stream(stream)
    assert stream.result.text.split() == found(tone(16_000))[0].split()
