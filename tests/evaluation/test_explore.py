"""The map of clips: places, neighbours, limits, and a page that needs nothing but itself."""

from __future__ import annotations

import base64
import io
import json
import re
from pathlib import Path

import numpy as np
import pytest
import soundfile
from PIL import Image

from spear.errors import ConfigError
from spear.evaluation.explore import Clip, Tokens, nearest, project, render, sound_seconds, spectrogram_uri, tokens_uri, wave_uri


def blobs(count: int = 12) -> np.ndarray:
    """Two far groups of embeddings (N, 5), even and odd rows."""
    rng = np.random.default_rng(0)
    centres = np.array([[5.0, 0, 0, 0, 1], [-5.0, 0, 0, 0, 1]])
    return (centres[np.arange(count) % 2] + 0.3 * rng.standard_normal((count, 5))).astype(np.float32)


def clips(count: int = 12) -> list[Clip]:
    time = np.arange(8000, dtype=np.float32) / 16000
    sounds = [0.2 * np.sin(2 * np.pi * (300 + 50 * row) * time).astype(np.float32) for row in range(count)]
    return [Clip(f"g{row % 2}/<{row}>.wav", f"g{row % 2}", 0.5, sounds[row], blobs(count)[row]) for row in range(count)]


@pytest.mark.parametrize("method", ["pca", "tsne"])
def test_project_keeps_groups_apart(method: str) -> None:
    places = project(blobs(), method)
    assert places.shape == (12, 2)
    assert places.min() == 0.0
    assert places.max() == 1.0
    inside = max(np.linalg.norm(places[row::2] - places[row::2].mean(0), axis=1).mean() for row in (0, 1))
    assert np.linalg.norm(places[::2].mean(0) - places[1::2].mean(0)) > inside
    np.testing.assert_array_equal(places, project(blobs(), method))


def test_project_places_two_clips_and_equal_clips() -> None:
    assert project(blobs(2), "tsne").shape == (2, 2)
    assert np.isfinite(project(np.ones((9, 3), np.float32), "pca")).all()
    with pytest.raises(ConfigError, match="`method` must be pca or tsne, but is 'umap'"):
        project(blobs(), "umap")


def test_nearest_are_of_the_same_group_and_never_the_clip_itself() -> None:
    order, cosines = nearest(blobs(), 5)
    assert order.shape == cosines.shape == (12, 5)
    for row, near in enumerate(order):
        assert set(near) == set(range(row % 2, 12, 2)) - {row}
    assert (np.diff(cosines, axis=1) <= 0).all()
    assert nearest(blobs(3), 6)[0].shape == (3, 2)


def test_sound_seconds_fill_the_limit_and_no_more() -> None:
    per_second = 2 * 16000 * 4 / 3 / 1e6  # MB
    assert sound_seconds([1.0, 2.0], 16000, 10.0, 3.01 * per_second) == 10.0
    assert sound_seconds([1.0, 100.0], 16000, 10.0, 11.01 * per_second) == 10.0
    assert sound_seconds([1.0, 8.0, 9.0], 16000, 10.0, 13 * per_second) == pytest.approx(6.0)
    with pytest.raises(ConfigError, match=r"`max_mb` is 0.01, which leaves 0.12 s of sound for each of 2 clips"):
        sound_seconds([1.0, 2.0], 16000, 10.0, 0.01)


def test_wave_uri_holds_the_sound() -> None:
    sound = np.array([0.0, 0.5, -0.5, 2.0], np.float32)
    samples, rate = soundfile.read(io.BytesIO(base64.b64decode(wave_uri(sound, 16000).removeprefix("data:audio/wav;base64,"))))
    assert rate == 16000
    np.testing.assert_allclose(samples, [0, 0.5, -0.5, 1], atol=1e-4)


@pytest.mark.parametrize("samples", [1, 500, 16000 * 6])
def test_spectrogram_uri_is_a_picture(samples: int) -> None:
    from PIL import Image

    picture = Image.open(io.BytesIO(base64.b64decode(spectrogram_uri(np.zeros(samples, np.float32)).removeprefix("data:image/png;base64,"))))
    assert picture.height == 64
    assert 1 <= picture.width <= 400


def test_spectrogram_uri_shows_low_tones_at_the_bottom() -> None:
    from PIL import Image

    low = np.sin(2 * np.pi * 200 * np.arange(16000) / 16000).astype(np.float32)
    picture = Image.open(io.BytesIO(base64.b64decode(spectrogram_uri(low).removeprefix("data:image/png;base64,"))))
    assert np.asarray(picture).mean(axis=1).argmax() > 48


def test_page_holds_everything_and_fetches_nothing(tmp_path: Path) -> None:
    page = render(clips(), "a </script><b>folder", "x/export", "pca", 16000)
    assert not re.findall(r"(?:src|href)=\"(?!data:)", page)
    assert "http://www.w3.org/2000/svg" in page
    assert "//" not in page.replace("http://www.w3.org/2000/svg", "").split("<script>")[0].split('<script type="application/json"')[0]
    assert "<b>folder" not in page
    assert "12 clips as x/export hears them" in page
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)
    assert found is not None
    data = json.loads(found[1])
    assert data["groups"] == ["g0", "g1"]
    assert [clip["name"] for clip in data["clips"]] == [f"g{row % 2}/<{row}>.wav" for row in range(12)]
    assert data["clips"][3]["group"] == 1
    assert all(clip["sound"].startswith("data:audio/wav;base64,") and clip["picture"].startswith("data:image/png;base64,") for clip in data["clips"])


def test_page_joins_the_smallest_groups() -> None:
    rows = [clip._replace(group=f"group {row}") for row, clip in enumerate(clips(14))]
    page = render(rows, "many", "x/export", "pca", 16000)
    found = re.search(r'id="data">(.*?)</script>', page, re.DOTALL)
    assert found is not None
    data = json.loads(found[1])
    assert len(data["groups"]) == 12
    assert data["groups"][-1] == "others"
    assert [clip["group"] for clip in data["clips"]][-3:] == [11, 11, 11]


def test_tokens_uri_draws_a_row_per_codebook_and_leaves_the_rest_clear() -> None:
    codes = np.array([[3, 5], [3, 6], [23, 7]])  # 3 and 23 share a colour: 20 there are
    uri = tokens_uri(Tokens(codes, 50.0, 0.025), 0.12)
    image = Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2])))
    levels = np.array(image)
    assert image.size == (6, 2)
    assert levels[0].tolist() == [20, *[(3 * 37 + 11) % 20] * 3, 20, 20]
    assert levels[1, 1:4].tolist() == [(x * 37 + 11) % 20 for x in (5, 6, 7)]
    assert image.info["transparency"] == 20
