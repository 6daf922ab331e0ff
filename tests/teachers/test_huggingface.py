"""Every family of Hugging Face teachers against transformers itself."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from spear.errors import ConfigError, DataError
from spear.teachers import Teacher, TeacherConfig, extract
from spear.teachers.huggingface import ADAPTERS, HuggingFaceConfig
from spear.teachers.waveform import ValidGroupNorm, conv_frames, receptive_field, unit_variance
from tests.teachers.conftest import FAMILIES, LAYER_NORM, make, noise

Build = Callable[..., Teacher]
Saved = Callable[[str], Path]
WAVEFORM = ["wavlm_group", "wavlm_layer", "hubert_layer", "wav2vec2_group", "data2vec", "unispeech_sat"]
FACTS = {
    # family: (rate in Hz, centre of the first frame in s, frames of 2 s)
    "w2v_bert": (50.0, 0.0175, 99),
    "whisper": (50.0, 0.0, 100),
    "whisper_encoder": (50.0, 0.0, 100),
    "ast": (10.0, 0.0875, (198 - 16) // 10 + 1),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_teacher_states_rate_and_gives_its_frames(teacher: Build, family: str) -> None:
    built = teacher(family, layer=1)
    rate, first, frames = FACTS.get(family, (50.0, 0.0125, (32000 - 400) // 320 + 1))
    assert (built.frame_rate_hz, built.num_layers, built.dim, built.sample_rate) == (rate, 3, 32, 16000)
    assert built.first_frame_s == pytest.approx(first)
    features, lens = built(noise(32000)[None], torch.tensor([32000]))
    assert lens.tolist() == [frames]
    assert features.shape == (1, frames, 32)


@pytest.mark.parametrize("family", FAMILIES)
def test_teacher_does_not_depend_on_batch_mates(teacher: Build, family: str) -> None:
    built = teacher(family, layer=-1)
    audio = [noise(16000, 1), noise(8123, 2), noise(27001, 3), noise(16000, 4)]
    together = extract(built, audio)
    for item, found in zip(audio, together):
        (alone,) = extract(built, [item])
        assert found.shape == alone.shape
        assert (found - alone).abs().max() < 1e-5


@pytest.mark.parametrize("family", ["data2vec", "wav2vec2_conformer"])
def test_teacher_knows_that_padding_changes_it(teacher: Build, family: str) -> None:
    assert teacher(family).depends_on_padding


def test_valid_group_norm_gives_a_padded_item_what_it_gives_it_alone() -> None:
    norm = ValidGroupNorm(6, 6)
    norm.weight.data.normal_(generator=torch.Generator().manual_seed(1))
    norm.bias.data.normal_(generator=torch.Generator().manual_seed(2))
    x = 3 + torch.randn(2, 6, 50, generator=torch.Generator().manual_seed(0))
    whole = norm(x)
    assert torch.equal(whole, nn.functional.group_norm(x, 6, norm.weight, norm.bias))
    norm.lens = torch.tensor([50, 31])
    found = norm(x)
    torch.testing.assert_close(found[0], whole[0])
    alone = nn.functional.group_norm(x[1:, :, :31], 6, norm.weight, norm.bias)[0]
    torch.testing.assert_close(found[1, :, :31], alone)
    assert not torch.allclose(whole[1, :, :31], alone, atol=1e-2)


def test_valid_group_norm_changes_no_fingerprint_and_nothing_alone(saved: Saved, teacher: Build) -> None:
    import transformers as tf

    model = tf.AutoModel.from_pretrained(saved("wavlm_group")).eval()
    assert [f"model.{name}" for name in model.state_dict()] == list(teacher("wavlm_group").state_dict())


@pytest.mark.parametrize(
    "family", ["wavlm_layer", "hubert_layer", "wav2vec2_layer", "whisper", "ast", "wavlm_group", "hubert_group", "wav2vec2_group"]
)
def test_teacher_is_batched_where_padding_does_not_matter(teacher: Build, family: str) -> None:
    assert not teacher(family).depends_on_padding


@pytest.mark.parametrize("family", WAVEFORM)
@pytest.mark.parametrize("layer", [0, 1, 2, -1, "last"])
def test_waveform_layer_is_that_of_transformers(saved: Saved, teacher: Build, family: str, layer: int | str) -> None:
    import transformers as tf

    model = tf.AutoModel.from_pretrained(saved(family)).eval()
    extractor = tf.AutoFeatureExtractor.from_pretrained(saved(family))
    inputs = extractor(noise(16000).numpy(), sampling_rate=16000, return_tensors="pt")
    with torch.no_grad():
        out = model(**inputs, output_hidden_states=True)
    expected = out.last_hidden_state if layer == "last" else out.hidden_states[int(layer)]
    (found,) = extract(teacher(family, layer=layer), [noise(16000)])
    torch.testing.assert_close(found, expected[0], atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("layer", [0, 1, 2, "last"])
@pytest.mark.parametrize("samples", [16000, 16123, 16240])
def test_w2v_bert_layer_is_that_of_transformers(saved: Saved, teacher: Build, layer: int | str, samples: int) -> None:
    import transformers as tf

    model = tf.Wav2Vec2BertModel.from_pretrained(saved("w2v_bert")).eval()
    inputs = tf.SeamlessM4TFeatureExtractor.from_pretrained(saved("w2v_bert"))(noise(samples).numpy(), sampling_rate=16000, return_tensors="pt")
    with torch.no_grad():
        out = model(**inputs, output_hidden_states=True)
    expected = out.last_hidden_state if layer == "last" else out.hidden_states[int(layer)]
    (found,) = extract(teacher("w2v_bert", layer=layer), [noise(samples)])
    assert len(found) == int(inputs["attention_mask"].sum())
    torch.testing.assert_close(found, expected[0, : len(found)], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("layer", [0, 1, 2, "last"])
@pytest.mark.parametrize("family", ["whisper", "whisper_encoder"])
def test_whisper_layer_is_that_of_transformers(saved: Saved, teacher: Build, family: str, layer: int | str) -> None:
    import transformers as tf

    model, extractor = make("whisper_encoder")
    mel = extractor(noise(16160).numpy(), sampling_rate=16000, return_tensors="pt")["input_features"]
    assert isinstance(extractor, tf.WhisperFeatureExtractor)
    with torch.no_grad():
        out = model.eval()(mel, output_hidden_states=True)
    expected = out.last_hidden_state if layer == "last" else out.hidden_states[int(layer)]
    (found,) = extract(teacher(family, layer=layer), [noise(16160)])
    assert len(found) == 51  # ceil(16160 / 320): the window's padding is dropped
    torch.testing.assert_close(found, expected[0, :51], atol=1e-5, rtol=1e-5)


def test_whisper_reads_long_audio_in_windows(teacher: Build) -> None:
    built = teacher("whisper", layer=1)
    audio = noise(32000 + 32000 + 700)
    (found,) = extract(built, [audio])
    assert len(found) == built.num_frames(len(audio)) == 203
    parts = extract(built, [audio[:32000], audio[32000:64000], audio[64000:]])
    torch.testing.assert_close(found, torch.cat(parts), atol=1e-5, rtol=0)


@pytest.mark.parametrize("layer", [0, 2, "last"])
def test_ast_layer_is_the_mean_over_frequency_of_transformers(saved: Saved, teacher: Build, layer: int | str) -> None:
    import transformers as tf

    model = tf.ASTModel.from_pretrained(saved("ast")).eval()
    inputs = tf.ASTFeatureExtractor.from_pretrained(saved("ast"))(noise(32000).numpy(), sampling_rate=16000, return_tensors="pt")
    with torch.no_grad():
        out = model(**inputs, output_hidden_states=True)
    tokens = out.last_hidden_state if layer == "last" else out.hidden_states[int(layer)]
    grid = tokens[0, 2:].reshape(12, 25, 32)  # (frequency, time, D)
    (mean,) = extract(teacher("ast", layer=layer), [noise(32000)])
    (concat,) = extract(teacher("ast", layer=layer, frequency="concat"), [noise(32000)])
    torch.testing.assert_close(mean, grid.mean(0)[:19], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(concat, grid.transpose(0, 1).flatten(1)[:19], atol=1e-4, rtol=1e-4)


def test_ast_frames_of_long_audio_are_evenly_spaced(teacher: Build) -> None:
    built = teacher("ast", layer=1)
    audio = noise(3 * 16000 + 16000)
    (found,) = extract(built, [audio])
    assert len(found) == (398 - 16) // 10 + 1
    # the second window starts 25 steps of 10 frames of 160 samples later
    (second,) = extract(built, [audio[25 * 10 * 160 :]])
    torch.testing.assert_close(found[25:], second, atol=1e-5, rtol=0)


def test_conv_frames_and_receptive_field_of_wavlm() -> None:
    kernels, strides = [10, 3, 3, 3, 3, 2, 2], [5, 2, 2, 2, 2, 2, 2]
    assert receptive_field(kernels, strides) == 400
    for samples in (0, 399, 400, 719, 720, 16000, 160000):
        assert conv_frames(samples, kernels, strides) == max(0, (samples - 400) // 320 + 1)


def test_unit_variance_uses_valid_samples_only() -> None:
    audio = torch.stack([noise(1000, 1), torch.cat([noise(600, 2), torch.full((400,), 7.0)])])
    found = unit_variance(audio, torch.tensor([1000, 600]))
    expected = (audio[1, :600] - audio[1, :600].mean()) / (audio[1, :600].var(unbiased=False) + 1e-7).sqrt()
    torch.testing.assert_close(found[1, :600], expected)
    assert not found[1, 600:].any()


def test_waveform_normalisation_follows_the_feature_extractor(saved: Saved, teacher: Build, tmp_path: Path) -> None:
    plain = tmp_path / "plain"
    shutil.copytree(saved("wavlm_layer"), plain)
    values = json.loads((plain / "preprocessor_config.json").read_text())
    (plain / "preprocessor_config.json").write_text(json.dumps({**values, "do_normalize": False}))
    loud = noise(16000)
    (with_norm,) = extract(teacher("wavlm_layer"), [loud])
    (louder,) = extract(teacher("wavlm_layer"), [3 * loud])
    (raw,) = extract(HuggingFaceConfig(model=str(plain)).build(), [loud])
    (forced,) = extract(HuggingFaceConfig(model=str(plain), normalize=True).build(), [loud])
    torch.testing.assert_close(with_norm, louder, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(with_norm, forced)
    assert (with_norm - raw).abs().max() > 1e-3


def test_stable_layer_norm_last_is_not_the_last_hidden_state(teacher: Build) -> None:
    (last,) = extract(teacher("wavlm_layer", layer="last"), [noise(16000)])
    (state,) = extract(teacher("wavlm_layer", layer=2), [noise(16000)])
    assert (last - state).abs().max() > 0.1


def test_teacher_pads_its_output_with_zeros(teacher: Build) -> None:
    built = teacher("wavlm_layer")
    audio = torch.nn.utils.rnn.pad_sequence([noise(16000), noise(8000)], batch_first=True, padding_value=9.0)
    features, lens = built(audio, torch.tensor([16000, 8000]))
    assert lens.tolist() == [49, 24]
    assert not features[1, 24:].any()
    (alone,) = extract(built, [noise(8000)])
    assert (features[1, :24] - alone).abs().max() < 1e-5


def test_teacher_is_frozen(teacher: Build) -> None:
    built = teacher("wavlm_group")
    built.train()
    assert not any(module.training for module in built.modules())
    assert not any(parameter.requires_grad for parameter in built.parameters())


def test_teacher_raises_data_error_when_audio_is_too_short(teacher: Build) -> None:
    with pytest.raises(DataError, match="399 samples is too short for one frame") as caught:
        extract(teacher("wavlm_layer"), [noise(16000), noise(399)])
    assert caught.value.cause == "too_short"


@pytest.mark.parametrize(("family", "layer"), [("wavlm_layer", 3), ("wavlm_group", -4), ("whisper", 7), ("ast", 3), ("w2v_bert", 3)])
def test_teacher_raises_config_error_when_layer_does_not_exist(saved: Saved, teacher: Build, family: str, layer: int) -> None:
    with pytest.raises(ConfigError, match=rf"`layer` must be between 0 and 2, but is {layer} \({saved(family)}"):
        teacher(family, layer=layer)


def test_teacher_raises_config_error_when_folder_has_no_weights(saved: Saved, tmp_path: Path) -> None:
    shutil.copy(saved("wavlm_layer") / "config.json", tmp_path)
    with pytest.raises(ConfigError, match=r"must hold weights \(model.safetensors\)"):
        HuggingFaceConfig(model=str(tmp_path)).build()


def test_teacher_raises_config_error_when_folder_has_no_config(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"must hold config\.json, but does not"):
        HuggingFaceConfig(model=str(tmp_path)).build()


def test_teacher_raises_config_error_when_config_is_not_json(saved: Saved, tmp_path: Path) -> None:
    shutil.copytree(saved("wavlm_layer"), tmp_path / "m")
    (tmp_path / "m" / "config.json").write_text("{")
    with pytest.raises(ConfigError, match=r"cannot be loaded"):
        HuggingFaceConfig(model=str(tmp_path / "m")).build()


def test_teacher_raises_config_error_when_weights_are_damaged(saved: Saved, tmp_path: Path) -> None:
    shutil.copytree(saved("wavlm_layer"), tmp_path / "m")
    weights = tmp_path / "m" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(ConfigError, match=r"m cannot be loaded: ") as caught:
        HuggingFaceConfig(model=str(tmp_path / "m")).build()
    assert "\n" not in str(caught.value)


def test_teacher_raises_config_error_when_a_weight_is_missing(saved: Saved, tmp_path: Path) -> None:
    shutil.copytree(saved("wavlm_layer"), tmp_path / "m")
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    (tmp_path / "m" / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 3}))
    with pytest.raises(ConfigError, match=r"must hold every weight of its config, but lacks encoder\.layers\.2"):
        HuggingFaceConfig(model=str(tmp_path / "m")).build()


def test_teacher_whose_checkpoint_lacks_the_mask_embedding_is_the_same_in_every_process(saved: Saved, tmp_path: Path) -> None:
    shutil.copytree(saved("wav2vec2_group"), tmp_path / "m")
    tensors = load_file(tmp_path / "m" / "model.safetensors")
    kept = {name: value for name, value in tensors.items() if not name.endswith("masked_spec_embed")}
    assert len(kept) == len(tensors) - 1
    save_file(kept, tmp_path / "m" / "model.safetensors", {"format": "pt"})
    found = set()
    for seed in (0, 1):
        torch.manual_seed(seed)
        found.add(HuggingFaceConfig(model=str(tmp_path / "m")).build().fingerprint())
    assert len(found) == 1


def test_teacher_raises_config_error_when_model_type_is_unknown(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(ConfigError, match=r"`model_type` must be one of audio-spectrogram-transformer, .*, but is 'bert'"):
        HuggingFaceConfig(model=str(tmp_path)).build()


def test_teacher_raises_config_error_when_path_does_not_exist(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"must be a folder or a Hugging Face id, but .*nothing does not exist"):
        HuggingFaceConfig(model=str(tmp_path / "nothing")).build(tmp_path)


@pytest.mark.parametrize("switched_off", [True, False])
def test_teacher_raises_config_error_when_id_cannot_be_had_offline(monkeypatch: pytest.MonkeyPatch, switched_off: bool) -> None:
    import socket

    import huggingface_hub.constants

    def unknown(*_: object) -> None:
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", switched_off)
    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    monkeypatch.setattr("spear.teachers.huggingface.getproxies", dict)
    with pytest.raises(ConfigError, match=r"`model` nobody/nothing cannot be loaded: it is no folder here, and the Hugging Face hub") as caught:
        HuggingFaceConfig(model="nobody/nothing").build()
    assert "\n" not in str(caught.value)


def test_teacher_folder_starts_from_the_data_folder(saved: Saved) -> None:
    found = HuggingFaceConfig(model="wavlm_layer", layer=1).build(saved("wavlm_layer").parent)
    assert found.name == "wavlm_layer"
    assert found.fingerprint() == HuggingFaceConfig(model=str(saved("wavlm_layer")), layer=1).build().fingerprint()


def test_fingerprint_covers_weights_and_settings_but_not_paths(saved: Saved, teacher: Build, tmp_path: Path) -> None:
    shutil.copytree(saved("wavlm_layer"), tmp_path / "copy")
    base = teacher("wavlm_layer", layer=1)
    assert HuggingFaceConfig(model=str(tmp_path / "copy"), layer=1).build().fingerprint() == base.fingerprint()
    assert teacher("wavlm_layer", layer=-2).fingerprint() == base.fingerprint()
    assert teacher("wavlm_layer", layer=None).fingerprint() == teacher("wavlm_layer", layer="last").fingerprint()
    import transformers as tf

    other = tf.WavLMModel(tf.WavLMConfig.from_pretrained(tmp_path / "copy"))
    other.save_pretrained(tmp_path / "other")
    shutil.copy(tmp_path / "copy" / "preprocessor_config.json", tmp_path / "other")
    fingerprints = {
        base.fingerprint(),
        teacher("wavlm_layer", layer=2).fingerprint(),
        teacher("wavlm_layer", layer=1, normalize=False).fingerprint(),
        HuggingFaceConfig(model=str(tmp_path / "other"), layer=1).build().fingerprint(),
        teacher("wavlm_group", layer=1).fingerprint(),
    }
    assert len(fingerprints) == 5


def test_teacher_config_round_trips_as_yaml() -> None:
    import draccus

    for values in ({"layer": 4}, {"layer": "last"}, {"layer": None}, {}):
        config = draccus.decode(TeacherConfig, {"type": "huggingface", "model": "a/b", **values})
        assert config == HuggingFaceConfig(model="a/b", **values)  # type: ignore[arg-type]
        assert draccus.encode(config, TeacherConfig)["type"] == "huggingface"


def test_every_adapter_can_be_imported() -> None:
    import importlib

    for target in ADAPTERS.values():
        module, _, name = target.partition(":")
        assert issubclass(getattr(importlib.import_module(module), name), Teacher)


def test_verified_raises_config_error_when_a_promise_is_broken(teacher: Build, monkeypatch: pytest.MonkeyPatch, saved: Saved) -> None:
    from spear.teachers.waveform import WaveformTeacher

    monkeypatch.setattr(WaveformTeacher, "num_frames", lambda self, samples: samples // 320)
    with pytest.raises(ConfigError, match=r"must give 50 frames for 16000 samples \(50 Hz\), but gives 49"):
        teacher("wavlm_layer")


def test_teacher_loads_a_checkpoint_with_a_head(tmp_path: Path) -> None:
    import transformers as tf

    from tests.teachers.conftest import CONVS

    torch.manual_seed(0)
    model: Any = tf.HubertForCTC(tf.HubertConfig(**CONVS, **LAYER_NORM, vocab_size=8))
    model.save_pretrained(tmp_path)
    tf.Wav2Vec2FeatureExtractor(do_normalize=False).save_pretrained(tmp_path)
    (found,) = extract(HuggingFaceConfig(model=str(tmp_path), layer=1).build(), [noise(16000)])
    with torch.no_grad():
        expected = model.eval().hubert(noise(16000)[None], output_hidden_states=True).hidden_states[1][0]
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
