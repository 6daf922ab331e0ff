"""``python s3prl_today.py ARGUMENTS``: `spear.evaluation.s3prl` where S3PRL 0.4.18 meets libraries that are newer than it.

S3PRL asks for names that torchaudio and huggingface_hub have dropped, for ``catalyst`` (only for several processes), and for SoX effects. Here the
names exist and the four effects that SUPERB's configs use are computed on tensors.
"""

from __future__ import annotations

import runpy
import sys
from types import ModuleType
from typing import Any

import huggingface_hub
import soundfile
import torch
import torchaudio


def apply_effects_tensor(waveform: torch.Tensor, sample_rate: int, effects: list[list[str]], **_: Any) -> tuple[torch.Tensor, int]:
    """Effects ``channels 1``, ``rate``, ``gain`` and ``norm`` on a waveform (C, S)."""
    for name, *values in effects:
        if name == "channels" and values == ["1"]:
            waveform = waveform.mean(dim=0, keepdim=True)
        elif name == "rate":
            wanted = int(values[0])
            waveform = waveform if wanted == sample_rate else torchaudio.functional.resample(waveform, sample_rate, wanted)
            sample_rate = wanted
        elif name == "gain":
            waveform = waveform * 10 ** (float(values[0]) / 20)
        elif name == "norm":
            waveform = waveform / waveform.abs().max().clamp(min=1e-9)
        else:
            raise NotImplementedError(f"SoX effect {name} {values}")
    return waveform, sample_rate


def apply_effects_file(path: str, effects: list[list[str]], **_: Any) -> tuple[torch.Tensor, int]:
    """The same on a file."""
    samples, sample_rate = soundfile.read(str(path), dtype="float32", always_2d=True)
    return apply_effects_tensor(torch.from_numpy(samples.T.copy()), sample_rate, effects)


def main() -> None:
    """Put the missing names in place and run."""
    sox = ModuleType("torchaudio.sox_effects")
    sox.apply_effects_file, sox.apply_effects_tensor = apply_effects_file, apply_effects_tensor  # type: ignore[attr-defined]
    torchaudio.sox_effects = sys.modules["torchaudio.sox_effects"] = sox
    for name in ("HfFolder", "Repository"):
        if name not in vars(huggingface_hub):
            setattr(huggingface_hub, name, type(name, (), {}))
    for name in ("catalyst", "catalyst.data", "catalyst.data.sampler"):
        sys.modules.setdefault(name, ModuleType(name))
    sys.modules["catalyst.data.sampler"].DistributedSamplerWrapper = lambda sampler: sampler  # type: ignore[attr-defined]
    runpy.run_module("spear.evaluation.s3prl", run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
