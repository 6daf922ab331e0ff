"""The card says what the run's artifacts say, and is a valid page with little or much to say."""

from __future__ import annotations

import yaml

from spear.export.model_card import render_card
from tests.export.tiny import tiny_encoder

INFO = {
    "name": "My model",
    "licence": "cc-by-4.0",
    "licence_notes": ["Teacher A asks for attribution.", "Corpus B is for research."],
    "teachers": [{"name": "speech", "type": "huggingface", "model": "microsoft/wavlm-large", "layer": 21}, {"name": "audio", "type": "mfcc"}],
    "corpora": [{"name": "read", "domain": "speech", "hours": 1.2345, "cuts": 17}, {"name": "events", "domain": "audio"}],
    "checkpoint": {"step": 400, "weights": "mean over the steps 300 to 400"},
    "compute": {"gpu_hours": 2.5},
}


def test_card_names_teachers_data_hours_compute_and_licence() -> None:
    text = render_card(tiny_encoder().encoder, INFO)
    for line in (
        "# My model",
        "| speech | microsoft/wavlm-large | 21 |",
        "| audio | mfcc |  |",
        "| read | speech | 1.23 | 17 |",
        "| events | audio |  |  |",
        "- weights: mean over the steps 300 to 400",
        "- gpu hours: 2.5",
        "- Teacher A asks for attribution.",
        "- Corpus B is for research.",
        "| layers | 2 |",
        "| frame rate | 50 Hz, first frame centred at 0.045 s |",
    ):
        assert line in text.splitlines()
    assert "distilled from 2 teachers" in text
    assert "The weights are under cc-by-4.0." in text
    assert f"| parameters | {sum(p.numel() for p in tiny_encoder().encoder.parameters()):,} |" in text


def test_card_head_is_yaml_with_the_fields_of_the_hub() -> None:
    for info in (INFO, {}):
        head = yaml.safe_load(render_card(tiny_encoder().encoder, info).split("---\n")[1])
        assert head["library_name"] == "transformers"
        assert head.get("license") == info.get("licence")
        assert "speech" in head["tags"]


def test_card_of_an_encoder_of_unknown_origin_claims_nothing() -> None:
    text = render_card(tiny_encoder().encoder, {})
    assert "distilled" not in text
    assert "carry no licence" in text
    assert not {"## Teachers", "## Data", "## Training", "## Compute", "## Origin"} & set(text.splitlines())
    assert "\n\n\n" not in text


def test_card_has_no_doubled_blank_lines_when_full() -> None:
    text = render_card(tiny_encoder().encoder, {**INFO, "source": "Imported from x."})
    assert "\n\n\n" not in text
    assert "Imported from x." in text.splitlines()


def test_card_says_how_much_context_a_frame_sees() -> None:
    assert "| context | the whole utterance |" in render_card(tiny_encoder().encoder, {})
    causal = tiny_encoder(causal=True, chunk_size=8, left_context_frames=64).encoder
    assert "| context | chunks of 8 frames at 50 Hz, 64 frames before them |" in render_card(causal, {})
    open_end = tiny_encoder(causal=True, chunk_size=8, left_context_frames=-1).encoder
    assert "| context | chunks of 8 frames at 50 Hz, everything before them |" in render_card(open_end, {})
    assert "| context | the whole utterance |" in render_card(tiny_encoder(causal=True, chunk_size=-1, left_context_frames=-1).encoder, {})
