"""Models that bring their own Python code, loaded only where the recipe trusts it."""

from __future__ import annotations

from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn

from spear.errors import ConfigError
from spear.teachers.huggingface import Source, loading, quiet

CLASSES = ("AutoModel", "AutoModelForAudioClassification")


def load_own_code(source: Source) -> Any:
    """Build the class that a folder brings, on the CPU, and fill it.

    Transformers' own loader builds models without memory and asks them for attributes of its latest version; older code bears neither.

    Raises:
        ConfigError: the recipe does not trust the code, or it cannot be loaded.
    """
    from transformers import AutoConfig
    from transformers.dynamic_module_utils import get_class_from_dynamic_module
    from transformers.utils import cached_file

    if not source.trust_remote_code:
        raise ConfigError(f"`model` {source.name} cannot be loaded: it brings its own Python code; read it, then set `trust_remote_code: true`")
    code = source.config.get("auto_map", {})
    reference = next((code[name] for name in CLASSES if name in code), None)
    if reference is None:
        raise ConfigError(f"`auto_map` must name one of {', '.join(CLASSES)}, but does not ({source.name}/config.json)")
    with quiet(), loading(source.name, is_folder=source.is_folder):
        config = AutoConfig.from_pretrained(source.location, trust_remote_code=True, **source.options)
        model: nn.Module = get_class_from_dynamic_module(reference, source.location, **source.options)(config)
        path = cached_file(source.location, "model.safetensors", _raise_exceptions_for_missing_entries=False, **source.options)
        if path is not None:
            state = load_file(path)
        else:
            state = torch.load(cached_file(source.location, "pytorch_model.bin", **source.options), map_location="cpu", weights_only=True)
        wanted = model.state_dict()
        missing = sorted(set(wanted) - set(state))
        if missing:
            raise ValueError(f"its weights lack {missing[0]} and {len(missing) - 1} more")
        model.load_state_dict({name: state[name] for name in wanted})
    return model.float()
