"""Token extraction: `spear tokens` against a plain loop over unsorted cuts in padded batches of 8, and where its time goes.

    python tools/bench_tokens.py --seconds 240            # a random WavLM of the size of WavLM-Base, noise as audio
    python tools/bench_tokens.py --layers 2 --seconds 60  # quick

Both make the codes of the same cuts with the same teacher and quantizer, from FLAC files of 2 to 20 s (log-uniform) to blocks on the disk. The
plain loop decodes, pads, encodes and writes one after the other, and its codes depend on batch mates.
"""

from __future__ import annotations

import argparse
import logging
import random
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import soundfile
import torch
from lhotse import CutSet, Recording

from spear.data.audio import load_audio
from spear.data.token_store import TokenWriter
from spear.quantizers.kmeans import KMeansConfig
from spear.quantizers.mvq_fit import MVQConfig
from spear.stages.tokens import Job, Share, Tokenizer, _fill
from spear.teachers.base import Teacher, default_device, extract
from spear.teachers.extraction import TokensConfig, read_cuts
from spear.teachers.huggingface import HuggingFaceConfig
from spear.types import TokenSpec


class Clock:
    """Counts the time inside a teacher's forward."""

    def __init__(self, teacher: Teacher) -> None:
        self.inside, self._encode = 0.0, teacher._encode
        teacher._encode = self  # type: ignore[method-assign]

    def __call__(self, audio: torch.Tensor, lens: torch.Tensor) -> Any:
        """Run the teacher."""
        start = time.monotonic()
        found = self._encode(audio, lens)
        if audio.is_cuda:
            torch.cuda.synchronize()
        self.inside += time.monotonic() - start
        return found


def make_teacher(folder: Path, layers: int, norm: str) -> Teacher:
    """A random WavLM with Base's widths, as a Hugging Face folder."""
    import transformers as tf

    torch.manual_seed(0)
    model = tf.WavLMModel(tf.WavLMConfig(num_hidden_layers=layers, feat_extract_norm=norm, do_stable_layer_norm=norm == "layer"))
    model.save_pretrained(folder)
    tf.Wav2Vec2FeatureExtractor(do_normalize=True, return_attention_mask=True).save_pretrained(folder)
    return HuggingFaceConfig(model=str(folder), layer=layers).build()


def make_cuts(folder: Path, seconds: float) -> Path:
    """FLAC files of 2 to 20 s and their manifest, in random order."""
    rng, chance, total = np.random.default_rng(0), random.Random(0), 0.0
    cuts: list[Any] = []
    while total < seconds:
        duration = 2.0 * 10 ** chance.random()
        path = folder / f"{len(cuts):05d}.flac"
        soundfile.write(path, (0.1 * rng.standard_normal(int(duration * 16000))).astype(np.float32), 16000)
        cut = Recording.from_file(path).to_cut()
        cuts.append(cut.with_id(path.stem))
        total += duration
    CutSet.from_cuts(cuts).to_file(folder / "cuts.jsonl.gz")
    return folder / "cuts.jsonl.gz"


def plain(tokenizer: Tokenizer, manifest: Path, writer: TokenWriter, size: int = 8) -> None:
    """The straightforward loop."""
    cuts = list(read_cuts(manifest))
    for number, start in enumerate(range(0, len(cuts), size)):
        group = cuts[start : start + size]
        audio = [torch.from_numpy(load_audio(cut)) for cut in group]
        lens = torch.tensor([len(item) for item in audio])
        with torch.no_grad():
            padded = torch.nn.utils.rnn.pad_sequence(audio, batch_first=True).to(tokenizer.device)
            features, frames = tokenizer.teacher._encode(padded, lens.to(tokenizer.device))
        codes = [tokenizer.encode(item[:count]) for item, count in zip(features, frames.tolist())]
        writer.write(number, [cut.id for cut in group], codes)


def main() -> None:
    """Measure and say."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=240.0, help="of audio")
    parser.add_argument("--layers", type=int, default=12, help="of the teacher; 12 is WavLM-Base")
    parser.add_argument("--norm", choices=("group", "layer"), default="group", help="of its convolutions: Base has group, Large layer")
    parser.add_argument("--quantizer", choices=("mvq", "kmeans"), default="mvq")
    parser.add_argument("--batch-seconds", default="60", help="of `spear tokens`; a number or auto")
    parser.add_argument("--only", choices=("plain", "spear"))
    options = parser.parse_args()
    logging.disable(logging.WARNING)
    with tempfile.TemporaryDirectory() as name:
        root, device = Path(name), default_device()
        teacher = make_teacher(root / "teacher", options.layers, options.norm).to(device)
        manifest = make_cuts(root, options.seconds)
        sample = extract(teacher, [0.1 * torch.randn(16000 * 40)])[0]
        config = MVQConfig(num_codebooks=8, codebook_size=16) if options.quantizer == "mvq" else KMeansConfig(codebook_size=100)
        quantizer: Any = config.fit(sample, sample[:100], seed=0, checkpoint=root / "fit.safetensors")
        spec = TokenSpec(int(quantizer.num_codebooks), int(quantizer.codebook_size), teacher.frame_rate_hz, teacher.first_frame_s)
        tokenizer = Tokenizer("bench", teacher, quantizer.to(device) if isinstance(quantizer, torch.nn.Module) else quantizer, spec, device)
        settings = TokensConfig(batch_seconds="auto" if options.batch_seconds == "auto" else float(options.batch_seconds))
        cuts = list(read_cuts(manifest))
        audio_s, clock, took = sum(cut.duration for cut in cuts), Clock(teacher), SimpleNamespace(plain=0.0, spear=0.0)
        report = f"{len(cuts)} cuts, {audio_s:.0f} s, {torch.get_num_threads()} threads, {device}"
        for kind in ("plain", "spear"):
            if options.only not in (None, kind):
                continue
            writer = TokenWriter(root / kind, spec)
            clock.inside, start = 0.0, time.monotonic()
            if kind == "plain":
                plain(tokenizer, manifest, writer)
            else:
                _fill(Job(tokenizer, manifest, writer, settings, len(cuts)), Share(), "bench")
            wall = time.monotonic() - start
            setattr(took, kind, wall)
            report += f"\n{kind}: {wall:.1f} s, {audio_s / wall:.2f} x real time, {100 * clock.inside / wall:.1f} % of it in the teacher"
        if took.plain and took.spear:
            report += f"\nratio {took.plain / took.spear:.2f}"
    print(report)


if __name__ == "__main__":
    main()
