"""Speak sentences with espeak-ng and say when each word and phone begins: one JSON request a line on stdin, one answer each on stdout.

espeak-ng's state leaks from one call to the next, so every sentence is spoken by a fresh process, forked from this small one; and it seeds the
noise of breathy voices with the time of day, so a fixed seed is set. The samples then depend on the request alone. The library comes with
``pip install espeakng-loader`` (GPL-3) and is loaded in this process only.

Request: ``{"text", "voice", "rate", "pitch", "range"}``; answer: a JSON line ``{"num_bytes", "sample_rate", "events": [[type, start_s, name], ...]}``
with types ``word``, ``phone`` and ``pause``, then that many bytes of 16-bit samples. Words that espeak-ng speaks as one ("for the") are one event.
A voice that does not exist ends the process with code 1.
"""

from __future__ import annotations

import ctypes
import json
import os
import sys
from typing import Any, BinaryIO

import espeakng_loader

# espeak-ng's speak_lib.h
SYNCHRONOUS, PHONE_EVENTS, IPA, KEEP_PROCESS, UTF8 = 2, 0x1, 0x2, 0x8000, 1
PARAMETERS = {"rate": 1, "pitch": 3, "range": 4}
END_OF_LIST, WORD, END_OF_CLAUSE, PHONE = 0, 1, 5, 7
STRESS = "ˈˌ"
SEED = 1


class Identity(ctypes.Union):
    """What an event names: a word's number, or up to eight bytes of a phone's symbol."""

    _fields_ = [("number", ctypes.c_int), ("symbol", ctypes.c_char * 8)]


class EspeakEvent(ctypes.Structure):
    """espeak_EVENT: `position` is 1-based in characters of the text, `sample` counts from the start of the audio."""

    _fields_ = [
        ("type", ctypes.c_int),
        ("unique_identifier", ctypes.c_uint),
        ("position", ctypes.c_int),
        ("length", ctypes.c_int),
        ("milliseconds", ctypes.c_int),
        ("sample", ctypes.c_int),
        ("user_data", ctypes.c_void_p),
        ("identity", Identity),
    ]


def _event(event: EspeakEvent, sample_rate: int) -> list[Any]:
    """[type, start_s, name]; the name of a word is its position in the text for now."""
    start_s = event.sample / sample_rate
    if event.type == WORD:
        return ["word", start_s, event.position - 1]
    symbol = bytes(event.identity.symbol).decode().strip(STRESS) if event.type == PHONE else ""
    return ["phone" if symbol else "pause", start_s, symbol]


def _name_words(events: list[list[Any]], text: str) -> None:
    """Replace each word's position by the text from there to the next word."""
    words = [event for event in events if event[0] == "word"]
    ends = [event[2] for event in words[1:]] + [len(text)]
    for event, end in zip(words, ends):
        event[2] = text[event[2] : end].strip()


def _has_voice(voice: str) -> bool:
    """Whether the variant of ``language+variant`` is there: espeak-ng itself falls back to the plain language in silence."""
    variant = voice.partition("+")[2]
    return not variant or os.path.isfile(os.path.join(espeakng_loader.get_data_path(), "voices", "!v", variant))


def speak(library: ctypes.CDLL, request: dict[str, Any], out: BinaryIO) -> int:
    """Answer one request; returns the exit code."""
    sample_rate = library.espeak_Initialize(SYNCHRONOUS, 0, os.fsencode(espeakng_loader.get_data_path()), PHONE_EVENTS | IPA | KEEP_PROCESS)
    if sample_rate <= 0 or not _has_voice(request["voice"]) or library.espeak_SetVoiceByName(request["voice"].encode()) != 0:
        print(f"espeak-ng does not start, or has no voice {request['voice']!r}", file=sys.stderr)
        return 1
    library.espeak_ng_SetRandSeed(ctypes.c_long(SEED))
    samples, events = bytearray(), []

    def receive(chunk: int | None, count: int, found: Any) -> int:
        if chunk and count > 0:
            samples.extend(ctypes.string_at(chunk, 2 * count))
        index = 0
        while (event := found[index]).type != END_OF_LIST:
            if event.type in (WORD, END_OF_CLAUSE, PHONE):
                events.append(_event(event, sample_rate))
            index += 1
        return 0

    callback = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_int, ctypes.POINTER(EspeakEvent))(receive)
    library.espeak_SetSynthCallback(callback)
    for name, number in PARAMETERS.items():
        library.espeak_SetParameter(number, request[name], 0)
    text = request["text"].encode()
    library.espeak_Synth(text, len(text) + 1, 0, 1, 0, UTF8, None, None)
    _name_words(events, request["text"])
    header = {"num_bytes": len(samples), "sample_rate": sample_rate, "events": events}
    out.write(json.dumps(header).encode() + b"\n" + samples)
    out.flush()
    return 0


def main() -> int:
    """Answer requests until stdin ends; returns the exit code."""
    library = ctypes.CDLL(espeakng_loader.get_library_path())
    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            code = 1
            try:
                code = speak(library, json.loads(line), sys.stdout.buffer)
            except BrokenPipeError:
                code = 1
            finally:
                os._exit(code)
        if os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) != 0:
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
