"""``spear doctor``: what is installed, what is missing, and what each missing thing costs."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

from spear import native

OLDEST, NEWEST = (3, 10), (3, 13)

REQUIRED = {
    "torch": "nothing runs",
    "numpy": "nothing runs",
    "scipy": "audio is not resampled",
    "lhotse": "there are no manifests and shards",
    "urllib3": "lhotse does not import",
    "transformers": "there are no Hugging Face teachers and no export",
    "safetensors": "weights are neither read nor written",
    "soundfile": "audio is not read",
    "draccus": "recipes are not read",
    "yaml": "recipes are not read",
    "rich": "there is no progress bar",
    "tensorboard": "there are no TensorBoard logs",
    "sklearn": "there is no k-means quantizer",
    "matplotlib": "there are no plots",
    "jinja2": "there is no report and no model card",
}
OPTIONAL = {
    "faiss": "k-means of quantizers has no `solver: faiss`",
    "espeakng_loader": "egs/mini cannot make its speech; install the extra [mini]",
    "multi_quantization": "tools/bench_mvq.py has nothing to compare with; install the extra [dev]",
    "onnx": "there is no `spear export --format onnx`; install the extra [onnx]",
    "onnxruntime": "there is no `spear export --format onnx`; install the extra [onnx]",
    "sentencepiece": "`spear finetune` has no `units: pieces`; install the extra [finetune]",
    "pyarrow": "`spear encode` writes no Parquet; install the extra [parquet]",
    "dasheng": "there is no teacher `type: dasheng`; Dasheng of Hugging Face needs no package",
    "torchaudio": "nothing in spear; teachers that bring their own code may want it",
}
DISTRIBUTIONS = {"faiss": "faiss-cpu", "sklearn": "scikit-learn", "espeakng_loader": "espeakng-loader", "yaml": "PyYAML"}


def version(module: str) -> str | None:
    """Installed version of a module, None where it is missing."""
    if importlib.util.find_spec(module) is None:
        return None
    try:
        return importlib.metadata.version(DISTRIBUTIONS.get(module, module))
    except importlib.metadata.PackageNotFoundError:
        return "unknown version"


def doctor(say: Callable[[str], None]) -> int:
    """Say line by line what is there; returns 1 where a required part is missing, else 0."""
    broken = 0
    here = sys.version_info[:2]
    fits = OLDEST <= here <= NEWEST
    say(f"{'ok     ' if fits else 'untried'} Python {platform.python_version()} (supported: 3.10 to 3.13)")
    for module, cost in REQUIRED.items():
        found = version(module)
        broken += found is None
        say(f"ok      {module} {found}" if found else f"MISSING {module}: without it {cost}")
    for module, cost in OPTIONAL.items():
        found = version(module)
        say(f"ok      {module} {found} (optional)" if found else f"absent  {module} (optional): {cost}")
    _say_compiler(say)
    _say_processors(say)
    say(f"ok      {shutil.disk_usage(Path.cwd()).free / 1e9:.0f} GB free here")
    offline = os.environ.get("HF_HUB_OFFLINE") or os.environ.get("TRANSFORMERS_OFFLINE")
    say(f"ok      Hugging Face hub {'offline by environment: teachers must be local folders' if offline else 'allowed'}")
    return 1 if broken else 0


def _say_compiler(say: Callable[[str], None]) -> None:
    """The compiler that loops are built with on first use."""
    found = native.compiler()
    if os.environ.get(native.SWITCH, "1") == "0":
        say(f"absent  compiled loops: {native.SWITCH}=0 turns them off, so that plain torch does their work, slower")
    elif found is None:
        say("absent  C++ compiler (optional): plain torch does the work of compiled loops, slower")
    else:
        say(f"ok      C++ compiler {found} (optional)")


def _say_processors(say: Callable[[str], None]) -> None:
    """CPU cores and GPUs, as far as torch is there to tell."""
    say(f"ok      {os.cpu_count()} CPU cores")
    if version("torch") is None:
        return
    import torch

    for index in range(torch.cuda.device_count()):
        say(f"ok      GPU {index}: {torch.cuda.get_device_name(index)}")
    if not torch.cuda.is_available():
        say("absent  GPU: teachers and pre-training run on the CPU, enough for the mini road and nothing bigger")
