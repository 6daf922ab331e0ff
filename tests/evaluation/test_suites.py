"""Suites: they load, say what they need, and give a run the tasks that its corpora allow."""

from __future__ import annotations

import pytest

from spear.data.corpora import CorpusConfig
from spear.data.sources import CutsSource
from spear.errors import ConfigError
from spear.evaluation.suites import load_suite, names, tasks_of
from spear.evaluation.tasks.base import Settings


def corpora(*pairs: tuple[str, str]) -> list[CorpusConfig]:
    return [CorpusConfig(name=name, domain=domain, source=CutsSource(train="x")) for name, domain in pairs]


@pytest.mark.parametrize("name", names())
def test_suites_tasks_build_and_read_the_corpora_they_name(name: str) -> None:
    suite = load_suite(name)
    assert len(suite.about) > 40
    for task, about in suite.tasks.items():
        assert about.task.build(task, Settings()).name == task
        assert about.task.corpora == about.corpora
        assert about.labels
        assert name == "mini" or (about.splits and about.published)


def test_tasks_of_takes_what_the_corpora_allow_and_names_the_rest(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    assert list(tasks_of("superb", corpora(("iemocap", "speech"), ("librispeech_100", "speech")))) == [
        "emotion_recognition",
        "phoneme_recognition",
        "speech_recognition",
    ]
    assert "suite superb: keyword_spotting is left out, as there is no corpus speech_commands" in caplog.text


def test_tasks_of_goes_by_domains_where_no_corpus_is_named() -> None:
    assert list(tasks_of("mini", corpora(("anything", "audio")))) == ["events"]


def test_tasks_of_raises_config_error_when_nothing_fits() -> None:
    with pytest.raises(ConfigError, match=r"`--suite` hear has no task for this run: a corpora file names corpora of the suite \(crema_d"):
        tasks_of("hear", corpora(("mine", "speech")))


def test_load_suite_raises_config_error_for_an_unknown_name() -> None:
    with pytest.raises(ConfigError, match="`--suite` must be one of hear, mini, superb.*but is 'super'"):
        load_suite("super")
