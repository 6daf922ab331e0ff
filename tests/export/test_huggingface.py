"""The folder as a Transformers model, where this package and its training dependencies cannot be imported."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import soundfile
import torch
from transformers import AutoFeatureExtractor, AutoModel

from spear.data.fbank import fbank_batch
from spear.errors import CheckpointError, DataError
from spear.export import AudioEncoder, load_encoder, save_encoder
from spear.export.configuration_spear import SpearConfig
from spear.export.feature_extraction_spear import SpearFeatureExtractor
from spear.export.huggingface import ENTRIES, model_code, register
from spear.export.layout import student_fields
from spear.export.modeling_spear import SpearModel
from spear.files import read_tensors, write_tensors
from spear.types import EncoderOutput
from tests.export.tiny import tiny_encoder, tone

LENGTHS = (9000, 160, 6000)
Served = tuple[Path, dict[str, torch.Tensor], EncoderOutput]
CLIENT = """
import importlib.abc, sys

class Block(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("spear", "draccus", "lhotse"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Block())
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoFeatureExtractor, AutoModel

folder, given, result = sys.argv[1:4]
rows = [value.numpy() for _, value in sorted(load_file(given).items())]
model = AutoModel.from_pretrained(folder, trust_remote_code=True)
extractor = AutoFeatureExtractor.from_pretrained(folder, trust_remote_code=True)
inputs = extractor(rows, sampling_rate=16000)
found = {}
with torch.no_grad():
    out = model(**inputs)
    found["features"], found["lens"] = out["encoder_out"], out["encoder_out_lens"]
    found.update({f"layer{i}": state.clone() for i, state in enumerate(out["hidden_states"])})
    found["files"] = model(*model.load_audio(sys.argv[4:])).encoder_out
    half = AutoModel.from_pretrained(folder, trust_remote_code=True, dtype=torch.bfloat16)
    assert next(half.parameters()).dtype == torch.bfloat16
    found["half"] = half(**inputs).encoder_out.float()
    model.save_pretrained(result + "-again")
    again = AutoModel.from_pretrained(result + "-again", trust_remote_code=True)
    found["again"] = again(**inputs).encoder_out
    assert out["intermediate_hidden_states"] is out.hidden_states
    assert "hidden_states" not in model(**inputs, return_middle_layers=False)
    fresh = AutoModel.from_config(AutoConfig.from_pretrained(folder, trust_remote_code=True), trust_remote_code=True)
    assert all(bool(parameter.isfinite().all()) for parameter in fresh.parameters())
    bypass = fresh.model.encoder.encoders[0].layers[0].bypass.bypass_scale
    assert bool((bypass == 0.5).all()), "a fresh model keeps the encoder's own initial weights"
assert not [name for name in sys.modules if name.partition(".")[0] == "spear"]
save_file({name: value.contiguous() for name, value in found.items()}, result)
"""


def rows() -> list[torch.Tensor]:
    return [tone(length, 200.0 + 100 * i) for i, length in enumerate(LENGTHS)]


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Served:
    """Folder, what a client without this package gets from it, and what the training code gives."""
    root = tmp_path_factory.mktemp("client")
    encoder = tiny_encoder()
    save_encoder(root / "my-model.v1", encoder.encoder, encoder.student, {"name": "x"})
    write_tensors(root / "in.safetensors", {str(i): row for i, row in enumerate(rows())})
    paths = []
    for i, row in enumerate(rows()):
        paths.append(str(root / f"{i}.wav"))
        soundfile.write(paths[-1], row.numpy(), 16000, subtype="FLOAT")
    (root / "client.py").write_text(CLIENT)
    environment = {**os.environ, "HF_HOME": str(root / "home"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-I", str(root / "client.py"), str(root / "my-model.v1"), str(root / "in.safetensors"), str(root / "out"), *paths]
    done = subprocess.run(command, env=environment, cwd=root, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    audio = torch.nn.utils.rnn.pad_sequence(rows(), batch_first=True)
    with torch.no_grad():
        expected = encoder(audio, torch.tensor(LENGTHS))
    return root / "my-model.v1", read_tensors(root / "out"), expected


def test_client_without_the_package_gets_the_numbers_of_the_training_code(served: Served) -> None:
    _, found, expected = served
    torch.testing.assert_close(found["features"], expected.features, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(found["files"], expected.features, atol=1e-5, rtol=1e-5)
    assert found["lens"].tolist() == expected.lens.tolist()


def test_client_gets_hidden_states(served: Served) -> None:
    _, found, expected = served
    for layer, state in enumerate(expected.hidden_states):
        torch.testing.assert_close(found[f"layer{layer}"], state, atol=1e-5, rtol=1e-5)


def test_model_gives_hidden_states_at_50_hz_whatever_its_output_rate() -> None:
    model, encoder = _pair(output_downsampling_factor=2)
    with torch.no_grad():
        out, expected = model(tone(8000)), encoder(tone(8000))
    assert torch.equal(out.encoder_out, expected.features)
    assert [state.shape[1] for state in out.hidden_states] == [21, 21]
    assert [state.shape[1] for state in expected.hidden_states] == [11, 11]


def test_model_batch_independent_gives_what_each_item_gives_alone() -> None:
    model, _ = _pair()
    audio = torch.nn.utils.rnn.pad_sequence(rows(), batch_first=True)
    with torch.no_grad():
        out = model(audio, torch.tensor(LENGTHS), batch_independent=True)
        for i, row in enumerate(rows()):
            alone = model(row)
            frames = int(alone.encoder_out_lens)
            assert int(out.encoder_out_lens[i]) == frames
            torch.testing.assert_close(out.encoder_out[i, :frames], alone.encoder_out[0], atol=1e-5, rtol=1e-5)
            torch.testing.assert_close(out.hidden_states[1][i, :frames], alone.hidden_states[1][0], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("factor", [1, 2])
def test_model_encodes_a_long_recording_as_the_encoder_does(factor: int) -> None:
    model, encoder = _pair(output_downsampling_factor=factor)
    audio = tone(16000 * 5)
    found, expected = model.encode_long(audio, window_s=2.0, overlap_s=0.5), encoder.encode_long(audio, window_s=2.0, overlap_s=0.5)
    assert torch.equal(found.encoder_out, expected.features)
    assert found.encoder_out_lens.tolist() == expected.lens.tolist()
    assert "hidden_states" not in found


def test_client_in_bfloat16_keeps_float32_log_mels(served: Served) -> None:
    _, found, expected = served
    frames = int(expected.lens[0])
    # log-mels in bfloat16 (8 bits) would be wrong by up to 0.06 each; the weights alone cost about a percent
    assert (found["half"] - expected.features)[0, :frames].abs().max() < 0.03 * expected.features[0].abs().max()


def test_client_saves_a_folder_that_loads_again(served: Served) -> None:
    folder, found, expected = served
    torch.testing.assert_close(found["again"], expected.features, atol=1e-5, rtol=1e-5)
    again = folder.parent / "out-again"
    audio = torch.nn.utils.rnn.pad_sequence(rows(), batch_first=True)
    with torch.no_grad():
        torch.testing.assert_close(load_encoder(again)(audio, torch.tensor(LENGTHS)).features, expected.features, atol=1e-5, rtol=1e-5)


def test_model_raises_checkpoint_error_when_weights_are_missing(tmp_path: Path) -> None:
    encoder = tiny_encoder()
    save_encoder(tmp_path, encoder.encoder, encoder.student, {})
    state = read_tensors(tmp_path / "model.safetensors")
    del state["model.mask_emb"]
    write_tensors(tmp_path / "model.safetensors", state, {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"lacks 1 weights: model\.mask_emb"):
        SpearModel.from_pretrained(tmp_path)


def test_model_from_features_is_the_model_from_audio() -> None:
    model, _ = _pair()
    audio = tone(4000)[None]
    with torch.no_grad():
        first, second = model(audio), model.forward_features(*fbank_batch(audio, torch.tensor([4000])))
    assert torch.equal(first.encoder_out, second.encoder_out)
    assert first.last_hidden_state is first.encoder_out


def test_registered_classes_stand_in_for_the_code_of_a_folder(tmp_path: Path) -> None:
    encoder = tiny_encoder()
    save_encoder(tmp_path, encoder.encoder, encoder.student, {})
    register()
    model = AutoModel.from_pretrained(tmp_path)
    assert type(model) is SpearModel
    assert type(AutoFeatureExtractor.from_pretrained(tmp_path)) is SpearFeatureExtractor
    with torch.no_grad():
        assert torch.equal(model(tone(4000)).encoder_out, encoder(tone(4000)).features)


def test_config_default_is_the_base_encoder_and_survives_json(tmp_path: Path) -> None:
    config = SpearConfig(
        encoder_dim="32,48", downsampling_factor="1,2", num_encoder_layers="1,1", cnn_module_kernel="7,5", encoder_unmasked_dim="8,8"
    )
    config.save_pretrained(tmp_path)
    student = SpearConfig.from_pretrained(tmp_path).student()
    assert student == config.student()
    assert [stack.dim for stack in student.stacks()] == [32, 48]
    assert SpearConfig().student().downsampling_factor == (1, 2, 4, 8, 4, 2, 1)


def test_extractor_pads_lists_arrays_and_tensors() -> None:
    extractor = SpearFeatureExtractor()
    for given in ([row.numpy() for row in rows()], rows(), [row.tolist() for row in rows()]):
        batch = extractor(given, sampling_rate=16000)
        assert batch["audio"].shape == (3, 9000)
        assert batch["audio_lens"].tolist() == list(LENGTHS)
        assert not batch["audio"][1, 160:].any()
    for single in (rows()[0], rows()[0].numpy(), rows()[0].tolist()):
        assert extractor(single)["audio"].shape == (1, 9000)
    assert extractor(torch.stack([rows()[0]] * 2))["audio"].shape == (2, 9000)


def test_extractor_raises_data_error_when_input_is_wrong() -> None:
    extractor = SpearFeatureExtractor()
    with pytest.raises(DataError, match="`sampling_rate` must be 16000, but is 8000"):
        extractor(rows(), sampling_rate=8000)
    with pytest.raises(DataError, match="at least one waveform"):
        extractor([])
    with pytest.raises(DataError, match="must be finite"):
        extractor([torch.tensor([float("nan")])])
    with pytest.raises(DataError, match=r"must have the shape \(S,\), but one has \(2, 5\)"):
        extractor([torch.zeros(2, 5)])


def _pair(**changes: Any) -> tuple[SpearModel, AudioEncoder]:
    encoder = tiny_encoder(**changes)
    model = SpearModel(SpearConfig(**student_fields(encoder.student))).eval()
    model.model.load_state_dict(encoder.encoder.state_dict())
    return model, encoder


def test_the_files_that_transformers_looks_for_name_all_others() -> None:
    """Transformers 4 copies the imports of these files only, not what those import in turn."""
    code = model_code()
    for name in ENTRIES.values():
        named = set(re.findall(r"^\s*from\s+\.(\S+)\s+import", code[f"{name}.py"], flags=re.MULTILINE))
        assert {f"{other}.py" for other in named} | {f"{name}.py"} == set(code)
