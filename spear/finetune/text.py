"""Texts as symbols: characters, or the pieces of a SentencePiece model. Symbol 0 is CTC's blank."""

from __future__ import annotations

import abc
import base64
import io
import json
from collections import Counter
from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import Any

from spear.errors import ConfigError, DataError

BLANK = 0


class Tokenizer(abc.ABC):
    """size: number of symbols, the blank included."""

    size: int

    @abc.abstractmethod
    def encode(self, text: str) -> list[int] | None:
        """Symbols of a text, each 1 to size - 1; None where it has a character that the tokenizer does not know."""

    @abc.abstractmethod
    def decode(self, symbols: Sequence[int]) -> str:
        """The text of symbols."""

    @abc.abstractmethod
    def to_json(self) -> dict[str, Any]:
        """What `load_tokenizer` reads."""


class Characters(Tokenizer):
    """One symbol per character of the training texts."""

    def __init__(self, characters: Sequence[str]) -> None:
        self.characters = list(characters)
        self.size = len(self.characters) + 1
        self._index = {character: i + 1 for i, character in enumerate(self.characters)}

    def encode(self, text: str) -> list[int] | None:
        """See Tokenizer."""
        found = [self._index.get(character, BLANK) for character in text]
        return None if BLANK in found else found

    def decode(self, symbols: Sequence[int]) -> str:
        """See Tokenizer."""
        return "".join(self.characters[symbol - 1] for symbol in symbols)

    def to_json(self) -> dict[str, Any]:
        """See Tokenizer."""
        return {"type": "characters", "characters": self.characters}


class Pieces(Tokenizer):
    """A SentencePiece model (arXiv:1808.06226); piece p of the model is symbol p + 1.

    Raises:
        ConfigError: the package sentencepiece is not installed.
    """

    def __init__(self, model: bytes) -> None:
        self.model = model
        self._processor = _sentencepiece().SentencePieceProcessor(model_proto=model)
        self.size = int(self._processor.get_piece_size()) + 1

    def encode(self, text: str) -> list[int] | None:
        """See Tokenizer."""
        found: list[int] = self._processor.encode(text)
        return None if self._processor.unk_id() in found else [piece + 1 for piece in found]

    def decode(self, symbols: Sequence[int]) -> str:
        """See Tokenizer."""
        return str(self._processor.decode([int(symbol) - 1 for symbol in symbols]))

    def pieces(self) -> list[str]:
        """The pieces as they are written, a leading U+2581 for the begin of a word."""
        return [str(self._processor.id_to_piece(i)) for i in range(self.size - 1)]

    def to_json(self) -> dict[str, Any]:
        """See Tokenizer."""
        return {"type": "pieces", "model": base64.b64encode(self.model).decode()}


def fit_characters(texts: Iterable[str]) -> Characters:
    """The characters of `texts`, sorted.

    Raises:
        DataError: the texts are empty.
    """
    found = Counter(character for text in texts for character in text)
    if not found:
        raise DataError("the training texts must hold at least one character, but are empty", cause="labels")
    return Characters(sorted(found))


def fit_pieces(texts: Iterable[str], size: int) -> Pieces:
    """A unigram SentencePiece model of `size` pieces, the same for the same texts.

    Raises:
        ConfigError: the package sentencepiece is not installed, or the texts are too few for the size.
    """
    package, model = _sentencepiece(), io.BytesIO()
    settings: dict[str, Any] = {
        "vocab_size": size,
        "character_coverage": 1.0,
        "num_threads": 1,
        "bos_id": -1,
        "eos_id": -1,
        "minloglevel": 2,
        "hard_vocab_limit": False,
    }
    try:
        package.SentencePieceTrainer.train(sentence_iterator=iter(sorted(texts)), model_writer=model, **settings)
    except RuntimeError as error:
        raise ConfigError(f"`task.vocabulary` {size} does not fit the training texts: {' '.join(str(error).split())[:200]}") from error
    return Pieces(model.getvalue())


def load_tokenizer(value: dict[str, Any]) -> Tokenizer:
    """Undo `Tokenizer.to_json`."""
    return _tokenizer(json.dumps(value))


@lru_cache(maxsize=4)
def _tokenizer(text: str) -> Tokenizer:
    value = json.loads(text)
    return Pieces(base64.b64decode(value["model"])) if value["type"] == "pieces" else Characters(value["characters"])


def normalise(text: str, case: str) -> str:
    """Single spaces, none at the ends, in the case asked for: ``keep``, ``lower`` or ``upper``."""
    plain = " ".join(text.split())
    return {"lower": plain.lower(), "upper": plain.upper()}.get(case, plain)


def _sentencepiece() -> Any:
    try:
        import sentencepiece
    except ImportError as error:
        raise ConfigError(
            "`task.units: pieces` needs the package sentencepiece: install the extra [finetune], or take `units: characters`"
        ) from error
    return sentencepiece
