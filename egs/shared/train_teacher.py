"""Train one small teacher on the labels of one corpus and save it as an ordinary Hugging Face folder.

    python train_teacher.py --model wavlm --tier phone --cuts-train T.jsonl.gz --cuts-valid V.jsonl.gz --out DATA/teachers/speech
    python train_teacher.py --model wav2vec2-bert --label label --cuts-train T.jsonl.gz --cuts-valid V.jsonl.gz --out DATA/teachers/audio
    python train_teacher.py --model wav2vec2-bert --speaker --cuts-train T.jsonl.gz --cuts-valid V.jsonl.gz --out DATA/teachers/speaker

``--tier`` learns the symbol of an alignment tier frame by frame (frames without a symbol are a class of their own, which is not scored);
``--label`` learns a label of the whole cut, from the supervision's custom fields, on the mean over its frames; ``--speaker`` learns its speaker in
the same way, by cosines, from log-mels that keep a voice's long-term spectrum (a recipe says `normalize: false`), and is scored by the equal error
rate on the voices of the other splits, none of which may be in train. The model is trained through the very adapter that later serves it as a
teacher, so that both compute the same function. `DIR` holds config.json, preprocessor_config.json, model.safetensors and, last, artifact.json with
the scores. The result depends on the manifests, the arguments and the number of threads; a killed run starts over.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import (
    PretrainedConfig,
    SeamlessM4TFeatureExtractor,
    Wav2Vec2BertConfig,
    Wav2Vec2BertModel,
    Wav2Vec2FeatureExtractor,
    WavLMConfig,
    WavLMModel,
)

from spear.data.audio import load_audio
from spear.data.sources import CutsSource
from spear.errors import DataError, SpearError
from spear.evaluation.metrics import equal_error_rate
from spear.evaluation.tasks.verification import cosines, directions, draw_trials
from spear.files import seed_from, sha256_file, write_tensors, write_text
from spear.progress import Meter
from spear.stages.artifact import Artifact
from spear.teachers.base import Teacher
from spear.teachers.huggingface import HuggingFaceConfig
from spear.types import IGNORE

logger = logging.getLogger(__name__)

SAMPLE_RATE = 16000
SPEAKER = "speaker"
NO_DROPOUT = {"hidden_dropout": 0.0, "attention_dropout": 0.0, "activation_dropout": 0.0, "feat_proj_dropout": 0.0, "layerdrop": 0.0}
SMALL = {"hidden_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 384, "apply_spec_augment": False, **NO_DROPOUT}


class Example(NamedTuple):
    """One cut: (S,) float32 audio, its labelled stretches (class, start, end) in seconds, or one class for all of it, and that class's name."""

    audio: Tensor
    intervals: list[tuple[int, float, float]]
    label: int
    name: str = ""


def make_model(kind: str) -> tuple[PretrainedConfig, nn.Module, Any]:
    """Config, model with random weights and feature extractor of one kind of teacher, both at 50 Hz."""
    if kind == "wavlm":
        config: PretrainedConfig = WavLMConfig(
            conv_dim=(64,) * 5,
            conv_kernel=(10, 8, 4, 4, 4),
            conv_stride=(10, 4, 2, 2, 2),
            num_feat_extract_layers=5,
            feat_extract_norm="layer",
            feat_extract_activation="relu",
            hidden_act="relu",
            num_conv_pos_embeddings=16,
            num_conv_pos_embedding_groups=8,
            num_buckets=64,
            max_bucket_distance=128,
            **SMALL,
        )
        return config, WavLMModel(config), Wav2Vec2FeatureExtractor(do_normalize=True, return_attention_mask=True)
    config = Wav2Vec2BertConfig(
        feature_projection_input_dim=160,
        conv_depthwise_kernel_size=15,
        left_max_position_embeddings=32,
        right_max_position_embeddings=16,
        conformer_conv_dropout=0.0,
        **{**SMALL, "intermediate_size": 256},
    )
    return config, Wav2Vec2BertModel(config), SeamlessM4TFeatureExtractor(feature_size=80, num_mel_bins=80, stride=2)


def save_folder(folder: Path, config: PretrainedConfig, model: nn.Module, extractor: Any) -> None:
    """Write config, extractor and weights as ``save_pretrained`` would, each file at once."""
    config.architectures = [type(model).__name__]
    write_text(folder / "config.json", config.to_json_string())
    write_text(folder / "preprocessor_config.json", extractor.to_json_string())
    write_tensors(folder / "model.safetensors", {name: value.clone() for name, value in model.state_dict().items()}, {"format": "pt"})


def read_examples(path: Path, tier: str | None, label: str | None, classes: list[str]) -> list[Example]:
    """Audio and labels of a manifest; new symbols are appended to `classes` if it is empty, else they are an error; for speakers, known ones are.

    Raises:
        DataError: a cut has no such label, one that the training split lacks, or a voice of the training split.
    """
    cuts = [(item.cut, item.origin) for item in CutsSource(train=str(path)).files("train") if item.cut is not None]
    found: list[tuple[Any, list[tuple[str, float, float]], str]] = []
    for cut, origin in cuts:
        supervision = cut.supervisions[0] if cut.supervisions else None
        symbols = (supervision.alignment or {}).get(tier, []) if supervision and tier else []
        custom = {**(supervision.custom or {}), SPEAKER: supervision.speaker or ""} if supervision else {}
        name = str(custom.get(label, "")) if label else ""
        if not symbols and not name:
            raise DataError(f"cut {cut.id} ({origin}) has no {f'tier `{tier}`' if tier else f'label `{label}`'}")
        found.append((cut, [(item.symbol, item.start, item.end) for item in symbols], name))
    training = not classes
    if training:
        classes += sorted({symbol for _, spans, _ in found for symbol, _, _ in spans} | {name for _, _, name in found if name})
    index = {symbol: number for number, symbol in enumerate(classes)}
    for cut, spans, name in found:
        if label == SPEAKER and not training and name in index:
            raise DataError(f"cut {cut.id} is of speaker {name!r}, whom the training split has, too ({path})")
        for symbol in [name] if name else [symbol for symbol, _, _ in spans]:
            if symbol not in index and label != SPEAKER:
                raise DataError(f"cut {cut.id} is labelled {symbol!r}, which the training split lacks ({path})")
    return [
        Example(torch.from_numpy(load_audio(cut)), [(index[symbol], start, end) for symbol, start, end in spans], index.get(name, IGNORE), name)
        for cut, spans, name in found
    ]


def batches(lens: NDArray[np.int64], batch_size: int, rng: np.random.Generator) -> Iterator[NDArray[np.int64]]:
    """Endless batches of examples of similar length, every example once a pass."""
    pool = 8 * batch_size
    while True:
        order = rng.permutation(len(lens))
        for start in range(0, len(order) - batch_size + 1, pool):
            near = order[start : start + pool]
            near = near[np.argsort(lens[near], kind="stable")]
            groups = [near[at : at + batch_size] for at in range(0, len(near) - batch_size + 1, batch_size)]
            for number in rng.permutation(len(groups)):
                yield groups[number]


def frame_targets(example: Example, offset_s: float, frames: int, teacher: Teacher, nothing: int) -> Tensor:
    """(frames,) int64 class at the centre of every frame of a crop that begins at `offset_s`; `nothing` between labels."""
    centres = offset_s + teacher.first_frame_s + np.arange(frames) / teacher.frame_rate_hz
    out = np.full(frames, nothing, dtype=np.int64)
    for number, start, end in example.intervals:
        first, last = np.searchsorted(centres, (start, end))
        out[first:last] = number
    return torch.from_numpy(out)


class CosineClassifier(nn.Module):
    """Logits are scaled cosines between a vector and one direction per class (NormFace, arXiv:1704.06369)."""

    SCALE = 16.0

    def __init__(self, dim: int, num_classes: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(num_classes, dim))

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) to (..., classes)."""
        return self.SCALE * F.linear(F.normalize(x.float(), dim=-1), F.normalize(self.weight, dim=-1))


class Learner(nn.Module):
    """A teacher with a linear classifier on its frames, or on their mean.

    Args:
        teacher: the adapter; its model's weights are trained. num_classes: classes, without the one for no label.
        per_frame: whether labels are per frame. cosine: whether the classifier compares directions.
    """

    def __init__(self, teacher: Teacher, num_classes: int, *, per_frame: bool, cosine: bool = False) -> None:
        super().__init__()
        self.teacher, self.per_frame, self.num_classes = teacher, per_frame, num_classes
        self.classifier = CosineClassifier(teacher.dim, num_classes) if cosine else nn.Linear(teacher.dim, num_classes + per_frame)

    def forward(self, audio: Tensor) -> Tensor:
        """(N, S) audio of equal length to (N, T, classes) or (N, classes) logits."""
        features = self.teacher.encode(audio, torch.full((len(audio),), audio.shape[1])).features
        return self.classifier(features if self.per_frame else features.mean(dim=1))

    def targets(self, examples: list[Example], offsets: list[int], frames: int) -> Tensor:
        """(N, T) or (N,) int64 classes of crops that begin at `offsets` samples."""
        if not self.per_frame:
            return torch.tensor([example.label for example in examples])
        rows = [frame_targets(e, offset / SAMPLE_RATE, frames, self.teacher, self.num_classes) for e, offset in zip(examples, offsets)]
        return torch.stack(rows)


def train(learner: Learner, examples: list[Example], options: argparse.Namespace) -> None:
    """AdamW with a linear warm-up and a cosine to zero on `options.steps` batches of crops."""
    rng = np.random.default_rng(seed_from(options.seed, "teacher batches"))
    optimizer = torch.optim.AdamW(learner.parameters(), lr=options.learning_rate, weight_decay=0.01, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, options.learning_rate, options.steps, pct_start=0.1)
    lens = np.array([len(example.audio) for example in examples])
    longest = int(options.crop_s * SAMPLE_RATE)
    stream, start, total = batches(lens, options.batch_size, rng), time.monotonic(), 0.0
    with Meter("training the teacher", options.steps, unit="steps") as meter:
        for step in range(1, options.steps + 1):
            index = next(stream)
            chosen, size = [examples[i] for i in index], min(int(lens[index].min()), longest)
            offsets = [int(rng.integers(len(example.audio) - size + 1)) for example in chosen]
            audio = torch.stack([example.audio[offset : offset + size] for example, offset in zip(chosen, offsets)])
            with torch.autocast("cpu", torch.bfloat16):
                logits = learner(audio).float()
            targets = learner.targets(chosen, offsets, logits.shape[1])
            loss = F.cross_entropy(logits.flatten(0, -2), targets.flatten(), label_smoothing=0.05)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(learner.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            total += loss.item()
            meter.advance(1, audio_s=audio.numel() / SAMPLE_RATE)
            if step % 100 == 0:
                logger.info("step %d: loss %.3f (%.0f s)", step, total / 100, time.monotonic() - start)
                total = 0.0


@torch.no_grad()
def accuracy(learner: Learner, examples: list[Example]) -> float:
    """Share of labelled frames, or of cuts, that are recognised; float32, one whole cut at a time."""
    right = count = 0
    for example in examples:
        logits = learner(example.audio[None])
        targets = learner.targets([example], [0], logits.shape[1]).flatten()
        logits = logits.flatten(0, -2)[:, : learner.num_classes]
        labelled = targets < learner.num_classes
        right += int((logits.argmax(dim=1) == targets)[labelled].sum())
        count += int(labelled.sum())
    return right / count


@torch.no_grad()
def error_rate(learner: Learner, examples: list[Example], centre: NDArray[np.float32], seed: int) -> float:
    """Equal error rate of the cosines of mean frames, `centre` (D,) subtracted, on trials among new voices."""
    vectors = directions(mean_frames(learner.teacher, examples) - centre)
    ids = [f"{index:06d}" for index in range(len(examples))]
    trials = draw_trials(ids, [example.name for example in examples], 2000, seed_from(seed, "teacher trials"))
    return equal_error_rate(cosines(vectors, trials), trials.same)


def mean_frames(teacher: Teacher, examples: list[Example]) -> NDArray[np.float32]:
    """(M, D) means over the frames of each example."""
    found = [teacher.encode(example.audio[None], torch.tensor([len(example.audio)])).features[0].mean(dim=0) for example in examples]
    return torch.stack(found).numpy()


def run(options: argparse.Namespace) -> None:
    """Train, score and save; a finished folder is left alone."""
    splits = {name: path for name in ("train", "valid", "test") if (path := getattr(options, f"cuts_{name}")) is not None}
    keys = ("model", "tier", "label", "steps", "batch_size", "crop_s", "learning_rate", "seed", "threads")
    config = {key: getattr(options, key) for key in keys}
    by_voice = options.label == SPEAKER
    artifact = Artifact(options.out, kind="teacher", config=config, inputs={name: sha256_file(path) for name, path in splits.items()})
    if artifact.is_done():
        return
    torch.set_num_threads(options.threads)
    torch.use_deterministic_algorithms(True)
    torch.manual_seed(seed_from(options.seed, "teacher weights"))
    with artifact.making() as record:
        classes: list[str] = []
        data = {name: read_examples(path, options.tier, options.label, classes) for name, path in splits.items()}
        hf_config, model, extractor = make_model(options.model)
        save_folder(options.out, hf_config, model, extractor)
        teacher = HuggingFaceConfig(model=str(options.out.resolve()), normalize=False if by_voice else None).build()
        teacher.requires_grad_(True)
        learner = Learner(teacher, len(classes), per_frame=options.tier is not None, cosine=by_voice)
        train(learner, data["train"], options)
        others = {name: examples for name, examples in data.items() if name != "train"}
        if by_voice:
            with torch.no_grad():
                centre = mean_frames(teacher, data["train"]).mean(axis=0)
            record.extra = {f"eer_{name}": round(error_rate(learner, found, centre, options.seed), 4) for name, found in others.items()}
        else:
            record.extra = {f"accuracy_{name}": round(accuracy(learner, found), 4) for name, found in others.items()}
        save_folder(options.out, hf_config, teacher.model, extractor)
        record.counts = {"classes": len(classes), "parameters": sum(p.numel() for p in teacher.parameters()), **{n: len(d) for n, d in data.items()}}
        record.audio_s = sum(len(example.audio) for example in data["train"]) / SAMPLE_RATE
        logger.info("%s: %s", options.out, json.dumps({**record.counts, **record.extra}))


def main() -> int:
    """Run the command; returns the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--model", choices=("wavlm", "wav2vec2-bert"), required=True)
    parser.add_argument("--cuts-train", type=Path, required=True, metavar="FILE")
    parser.add_argument("--cuts-valid", type=Path, required=True, metavar="FILE", help="scored, never trained on")
    parser.add_argument("--cuts-test", type=Path, metavar="FILE", help="scored too")
    kind = parser.add_mutually_exclusive_group(required=True)
    kind.add_argument("--tier", metavar="NAME", help="alignment tier to learn, e.g. phone")
    kind.add_argument("--label", metavar="NAME", help="custom field to learn, e.g. label")
    kind.add_argument("--speaker", dest="label", action="store_const", const=SPEAKER, help="learn the speaker, whom the other splits must not have")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--crop-s", type=float, default=2.0, help="longest stretch of a cut in a batch, in seconds")
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2, help="CPU threads; the sums, and so the weights, depend on it")
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, stream=sys.stderr, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    try:
        run(options)
    except SpearError as error:
        print(f"train_teacher: error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
