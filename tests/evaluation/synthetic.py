"""A run's folder as the stages would leave it, with invented numbers: for tests of the report."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import torch

from spear.evaluation.examples import write_examples
from spear.files import make_folder, write_json

MODELS = [
    ("logmel", "logmel", "log-mel"),
    ("logmel_3", "logmel", "log-mel ±3 frames"),
    ("teacher_speech", "teacher", "teacher speech"),
    ("tokens_speech", "tokens", "speech from tokens"),
    ("teacher_audio", "teacher", "teacher audio"),
    ("tokens_audio", "tokens", "audio from tokens"),
    ("untrained", "untrained", "untrained student"),
    ("student", "student", "student"),
]
PHONES = [0.417, 0.507, 0.777, 0.755, 0.402, 0.398, 0.372, 0.717]
EVENTS = [0.247, 0.273, 0.31, 0.302, 0.827, 0.853, 0.283, 0.887]
SPEAKERS = [0.31, 0.29, 0.18, 0.2, 0.27, 0.28, 0.3, 0.14]


def record(value: float, kind: str, label: str, domain: str, *, metric: str = "accuracy", layers: int = 1) -> dict[str, object]:
    """One score."""
    names = [*(f"layer {i + 1}" for i in range(layers - 1)), "output", "weighted sum"] if layers > 1 else ["layer"]
    by_layer = {name: {"valid": value - 0.01 * i, "test": value - 0.012 * i} for i, name in enumerate(reversed(names))}
    return {
        "metric": metric,
        "higher_is_better": metric != "EER",
        "value": value,
        "std": 0.004,
        "ci": [value - 0.02, value + 0.021],
        "layer": names[-1],
        "by_layer": by_layer,
        "kind": kind,
        "label": label,
        "domain": domain,
        "chance": 0.5 if metric == "EER" else 0.1,
        "items": 300,
    }


def synthetic_scores() -> dict[str, dict[str, dict[str, object]]]:
    """Three tasks over eight models."""
    tasks = {"phones": (PHONES, "speech", "accuracy"), "events": (EVENTS, "audio", "accuracy"), "speakers": (SPEAKERS, "speech", "EER")}
    found: dict[str, dict[str, dict[str, object]]] = {
        task: {
            name: {**record(value, kind, label, domain, metric=metric, layers=5 if kind in {"student", "untrained"} else 1), "order": [i, j]}
            for j, ((name, kind, label), value) in enumerate(zip(MODELS, values))
        }
        for i, (task, (values, domain, metric)) in enumerate(tasks.items())
    }
    counts = [[30 if i == j else 2 * (j == (i + 1) % 4) for j in range(4)] for i in range(4)]
    confusion = {"classes": list("abcd"), "rows": [" ".join(map(str, row)) for row in counts]}
    for task in ("phones", "events"):
        found[task]["student"]["confusion"] = confusion
    return {**found, **token_scores()}


def token_scores() -> dict[str, dict[str, dict[str, object]]]:
    """Units and ABX of a teacher's tokens and of the student."""
    models = [("codes_speech", "codes", "speech tokens", 0.49, 0.12), ("student", "student", "student", 0.61, 0.06)]
    usage = {"phone_purity": 0.55, "bits_per_s": 301.0, "dedup_bits_per_s": 120.0}
    units, abx = {}, {}
    for j, (name, kind, label, pnmi, error) in enumerate(models):
        layers = 5 if kind == "student" else 1
        about = {"section": "tokens", **usage}
        units[name] = {**record(pnmi, kind, label, "speech", metric="PNMI", layers=layers), **about, "order": [3, j]}
        errors = {"across": error, "within": error / 2, "higher_is_better": False, "seeds": 1}
        abx[name] = {**record(error, kind, label, "speech", metric="ABX across", layers=layers), **about, **errors, "order": [4, j]}
    return {"units": units, "abx": abx}


def synthetic_analysis() -> dict[str, object]:
    """What `spear.evaluation.analysis` finds, for two domains."""
    layers = [*(f"layer {i + 1}" for i in range(4)), "output"]
    curve = {"noise": {"20": 1.0, "10": 0.9, "0": 0.6, "-10": 0.2}, "speed": {"0.8": 0.7, "0.9": 0.9, "1.1": 0.9, "1.25": 0.6}}
    labels = [("log-mel", "logmel"), ("teacher speech", "teacher"), ("teacher audio", "teacher"), ("student", "student")]
    about = {
        "cka": {name: {layer: 0.3 + 0.1 * i for i, layer in enumerate(layers)} for name in ("speech", "audio")},
        "effective_rank": {layer: 10.0 + i for i, layer in enumerate(layers)},
        "width": dict.fromkeys(layers, 128),
        "retrieval": {label: {"kind": kind, **curve} for label, kind in labels},
        "clips": 30,
        "models": [label for label, _ in labels],
    }
    return {"speech": about, "audio": about}


def synthetic_run(exp: Path, *, light: bool = False) -> Path:
    """Fill `exp` with scores, metrics, cards, costs and examples, with `light` one of each; returns it."""
    evaluate = make_folder(exp / "evaluate")
    scores = synthetic_scores()
    write_json(evaluate / "scores.json", {"phones": scores["phones"]} if light else scores)
    if not light:
        write_json(evaluate / "analysis.json", synthetic_analysis())
        write_json(evaluate / "models.json", [{"name": "student", "label": "student", "kind": "student", "parameters": 1_600_000}])
        write_json(evaluate / "speed" / "student.json", {"audio_s": 900.0, "wall_s": 6.0})
    (exp / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in _metrics()))
    usage = {"active_entries": [256, 251, 248, 256], "perplexity": [211.0, 190.5, 201.0, 188.0], "codebook_size": 256}
    write_json(
        evaluate / "cards.json", {name: {**usage, "bits_per_frame": 32, "relative_loss": 0.197} for name in ("speech", "audio")[: 1 if light else 2]}
    )
    write_json(evaluate / "costs.json", [_cost(stage, i) for i, stage in enumerate(["manifests", "features", "quantizers", "tokens", "shards"])])
    for stage, folder in (("pretrain", exp), ("export", exp / "export")):
        write_json(folder / "artifact.json", {"kind": stage, "audio_s": 3600.0, "measured": {"wall_s": 285.2, "peak_memory_mb": 1822.0}})
    write_examples(evaluate, [_example("speech", 300)] if light else [_example("speech", 300), _example("audio", 200)])
    return exp


def _metrics() -> list[dict[str, object]]:
    lines: list[dict[str, object]] = []
    for step in range(10, 1001, 10):
        loss = 2.5 + 3 * math.exp(-step / 300)
        lines.append(
            {
                "split": "train",
                "step": step,
                "loss": loss,
                "loss/speech/speech": loss,
                "loss/speech/audio": loss - 0.3,
                "loss/audio/audio": loss - 0.8,
                "accuracy/speech/speech": 0.5 - loss / 12,
            }
        )
        if step % 200 == 0:
            lines.append(
                {
                    "split": "valid",
                    "step": step,
                    "loss": loss + 0.1,
                    "loss/speech/speech": loss + 0.1,
                    "loss/audio/audio": loss - 0.6,
                    "accuracy/speech/speech": 0.48 - loss / 12,
                }
            )
    return lines


def _cost(stage: str, i: int) -> dict[str, object]:
    return {"stage": stage, "folders": 2, "audio_s": 2000.0 * i, "wall_s": 11.5 * (i + 1), "peak_memory_mb": 700.0 + 100 * i, "gpu_hours": 0.0}


def _example(domain: str, frames: int) -> tuple[dict[str, object], dict[str, torch.Tensor]]:
    rng = np.random.default_rng(frames)
    slope = np.linspace(-4, -12, 128)[None] + 3 * np.sin(np.arange(frames) / 9)[:, None] * np.cos(np.arange(128) / 11)[None]
    mask = torch.zeros(frames, dtype=torch.uint8)
    mask[40:55] = mask[120:150] = 1
    tensors = {"logmel": torch.from_numpy(slope + rng.normal(0, 0.6, slope.shape)).half(), "mask": mask}
    teachers = {}
    for name in ("speech", "audio") if domain == "audio" else ("speech",):
        codes = np.repeat(rng.integers(0, 256, (frames // 8 + 1, 4)), 4, axis=0)[: frames // 2 - 1]
        tensors[f"tokens.{name}"] = torch.from_numpy(codes).to(torch.int32)
        teachers[name] = {"frame_rate_hz": 50.0, "first_frame_s": 0.0125, "num_codebooks": 8}
    symbols = ["h", "ə", "l", "oʊ", "w", "ɜː", "l", "d"]
    segments = (
        [[0.2 + 0.3 * i, 0.2 + 0.3 * (i + 1) - (0.1 if i == 3 else 0), symbol] for i, symbol in enumerate(symbols)] if domain == "speech" else []
    )
    facts = {
        "id": f"{domain}-0001",
        "domain": domain,
        "duration_s": frames / 100,
        "segments": segments,
        "label": "siren" if domain == "audio" else None,
        "teachers": teachers,
    }
    return facts, tensors
