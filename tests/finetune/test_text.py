"""Tokenizers: what goes in comes out, what is unknown is said."""

from __future__ import annotations

import sys

import pytest

from spear.errors import ConfigError, DataError
from spear.finetune.text import fit_characters, fit_pieces, load_tokenizer, normalise

TEXTS = ["one two three", "four five six seven", "eight nine zero one", "two two four", "seven eight nine"] * 4


def test_characters_round_trip_and_refuse_the_unknown() -> None:
    tokenizer = fit_characters(["ba", "a c"])
    assert tokenizer.size == 5  # blank, space, a, b, c
    assert tokenizer.encode("a b") == [2, 1, 3]
    assert tokenizer.decode([2, 1, 3]) == "a b"
    assert tokenizer.encode("x") is None
    assert load_tokenizer(tokenizer.to_json()).encode("cab") == tokenizer.encode("cab")


def test_characters_raise_data_error_when_there_are_none() -> None:
    with pytest.raises(DataError, match="at least one character"):
        fit_characters(["", ""])


def test_pieces_round_trip_and_depend_on_the_set_of_texts_only() -> None:
    pytest.importorskip("sentencepiece", reason="an optional package")
    tokenizer = fit_pieces(TEXTS, 30)
    symbols = tokenizer.encode("three four")
    assert symbols is not None
    assert min(symbols) >= 1
    assert max(symbols) < tokenizer.size
    assert tokenizer.decode(symbols) == "three four"
    assert fit_pieces(reversed(TEXTS), 30).model == tokenizer.model
    assert load_tokenizer(tokenizer.to_json()).encode("three four") == symbols


def test_pieces_know_every_character_of_the_texts_they_are_fitted_on() -> None:
    pytest.importorskip("sentencepiece")
    texts = [f"{a} {b} goes home" for a in ("anna", "berta", "carl", "dora") for b in ("early", "late", "alone", "again")] * 100
    rare = "zo\u00eb goes home"
    encoded = fit_pieces([*texts, rare], 40).encode(rare)
    assert encoded is not None


def test_pieces_raise_config_error_when_the_package_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sentencepiece", None)
    with pytest.raises(ConfigError, match=r"install the extra \[finetune\]"):
        fit_pieces(TEXTS, 30)


def test_normalise_joins_spaces_and_sets_the_case() -> None:
    assert normalise("  One\tTWO ", "lower") == "one two"
    assert normalise("One  two", "upper") == "ONE TWO"
    assert normalise(" One two", "keep") == "One two"
