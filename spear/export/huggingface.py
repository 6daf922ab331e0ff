"""Write a model folder in the Hugging Face layout, with code that runs without this package."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from spear import __version__
from spear.errors import CheckpointError
from spear.export.flatten import flatten_modules
from spear.export.layout import MODEL_TYPE, PREFIX, student_fields, student_type
from spear.export.model_card import render_card
from spear.files import make_folder, write_json, write_tensors, write_text
from spear.models.base import Encoder, StudentConfig

ENTRIES = {f"spear.export.{name}": name for name in ("configuration_spear", "feature_extraction_spear", "modeling_spear")}
"""The modules that Transformers looks for, under the names it finds them by."""
SUBSTITUTES = {"spear.registry": "spear.export.plain_registry", "spear.models.zipformer.kernels": "spear.export.plain_kernels"}
"""What needs packages that a user of the exported model should not have to install."""
HEADER = f"# Part of spear {__version__} (Apache-2.0), arranged for Transformers.\n"


def write_folder(folder: Path, encoder: Encoder, student: StudentConfig, info: dict[str, Any]) -> None:
    """Write weights, configs, code and model card; the same encoder and info give the same bytes.

    Args:
        folder: made if absent. encoder: its weights are stored in float32. student: its config. info: JSON values, see `render_card`.
    Raises:
        CheckpointError: `student` is of a kind that a folder cannot describe, or a weight is not finite.
    """
    student_type(student)
    state = {key: value.detach().float() for key, value in encoder.state_dict().items()}
    broken = sorted(key for key, value in state.items() if not bool(value.isfinite().all()))
    if broken:
        raise CheckpointError(f"{len(broken)} weights hold NaN or infinity: {', '.join(broken[:5])}")
    make_folder(folder)
    for name, source in model_code().items():
        write_text(folder / name, source)
    write_json(folder / "config.json", model_config(encoder, student, info))
    write_json(folder / "preprocessor_config.json", preprocessor_config(encoder))
    write_tensors(folder / "model.safetensors", {PREFIX + key: value for key, value in state.items()}, {"format": "pt"})
    write_text(folder / "README.md", render_card(encoder, info))


def model_config(encoder: Encoder, student: StudentConfig, info: dict[str, Any]) -> dict[str, Any]:
    """Content of ``config.json``."""
    return {
        **student_fields(student),
        "model_type": MODEL_TYPE,
        "architectures": ["SpearModel"],
        "auto_map": {"AutoConfig": "configuration_spear.SpearConfig", "AutoModel": "modeling_spear.SpearModel"},
        "dtype": "float32",
        "sample_rate": encoder.sample_rate,
        "frame_rate_hz": encoder.frame_rate_hz,
        "first_frame_s": round(encoder.first_frame_s, 9),
        "spear_version": __version__,
        # how long things took is for the card alone: the config of two runs of the same recipe is the same
        **({"training": {key: value for key, value in info.items() if key != "compute"}} if info else {}),
    }


def preprocessor_config(encoder: Encoder) -> dict[str, Any]:
    """Content of ``preprocessor_config.json``."""
    return {
        "feature_extractor_type": "SpearFeatureExtractor",
        "auto_map": {"AutoFeatureExtractor": "feature_extraction_spear.SpearFeatureExtractor"},
        "feature_size": 1,
        "sampling_rate": encoder.sample_rate,
        "padding_value": 0.0,
    }


def model_code() -> dict[str, str]:
    """File name -> source of the model code, flat, with relative imports only."""
    files = flatten_modules(ENTRIES, SUBSTITUTES)
    entries = {f"{name}.py" for name in ENTRIES.values()}
    return {name: HEADER + source + (_naming(files, name) if name in entries else "") for name, source in files.items()}


def _naming(files: Iterable[str], name: str) -> str:
    """Lines that never run: Transformers 4 copies only those files that it finds imported in this very one."""
    lines = "".join(f"    from .{Path(other).stem} import __doc__ as _  # noqa: F401\n" for other in files if other != name)
    return f"\nif False:  # names every file of this folder for Transformers 4, which looks no further than this one\n{lines}"


def register() -> None:
    """Make Transformers' Auto classes use this package's code for ``model_type: spear``, instead of code copied from a folder."""
    from transformers import AutoConfig, AutoFeatureExtractor, AutoModel

    from spear.export.configuration_spear import SpearConfig
    from spear.export.feature_extraction_spear import SpearFeatureExtractor
    from spear.export.modeling_spear import SpearModel

    AutoConfig.register(MODEL_TYPE, SpearConfig, exist_ok=True)
    AutoModel.register(SpearConfig, SpearModel, exist_ok=True)
    AutoFeatureExtractor.register(SpearConfig, SpearFeatureExtractor, exist_ok=True)
