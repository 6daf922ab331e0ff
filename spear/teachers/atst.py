"""ATST-Frame as a teacher (arXiv:2306.04186), from its authors' checkpoint; the network is small and written here."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from spear.errors import ConfigError
from spear.teachers.base import Teacher, TeacherConfig, resolve_layer, verified
from spear.teachers.checkpoint import read_checkpoint
from spear.teachers.frontend import HOP_SAMPLES, decibel_mel
from spear.types import TeacherOutput

SAMPLE_RATE, NUM_MEL_BINS, FFT_SAMPLES, LOW_HZ, HIGH_HZ, TOP_DB = 16000, 64, 1024, 60.0, 7800.0, 80.0
LOWEST, HIGHEST = -79.6482, 50.6842
"""Decibels that become -1 and 1."""
PATCH_FRAMES = 4
HEAD_DIM = 64
PREFIXES = ("model.teacher.encoder.", "teacher.encoder.", "encoder.", "")


@dataclass(frozen=True, kw_only=True, slots=True)
class ATSTConfig(TeacherConfig):
    """The teacher branch of an ATST-Frame checkpoint."""

    weights: str
    """``.ckpt`` of a release, relative to the run's data folder, or a path; only its tensors are read, no code is run."""
    layer: int | Literal["last"] | None = "last"
    """0 is the input of the first block, k the output of block k after the final LayerNorm, as the authors take it; ``last`` is the last block's."""
    layers: list[int] = field(default_factory=list)
    """Several of them side by side instead, in this order; `layer` must not be given beside."""

    def __post_init__(self) -> None:
        if self.layers and (self.layer != "last" or len(set(self.layers)) < len(self.layers)):
            raise ConfigError(f"`layers` must be different numbers without `layer` beside, but is {self.layers}")

    def build(self, folder: Path | None = None) -> Teacher:
        """See TeacherConfig.build."""
        state = read_weights(self.weights, folder)
        try:
            model = FrameTransformer(state)
        except (KeyError, RuntimeError, ValueError) as error:
            raise ConfigError(f"`weights` {self.weights} are not those of ATST-Frame: {' '.join(str(error).split())[:200]}") from error
        return verified(ATSTTeacher(self, model.float()))


class ATSTTeacher(Teacher):
    """Frames of 40 ms: 25 Hz, the first centred at 15 ms; longer audio in pieces of 10 s that do not see each other."""

    def __init__(self, config: ATSTConfig, model: FrameTransformer) -> None:
        num_layers = len(model.blocks) + 1
        given: list[int | str | None] = [*config.layers] or [config.layer]
        wanted = [resolve_layer(layer, num_layers, config.weights) for layer in given]
        layers = [num_layers - 1 if layer is None else layer for layer in wanted]
        if len(set(layers)) < len(layers):
            raise ConfigError(f"`layers` must be different, but {config.layers} name one of {num_layers} twice ({config.weights})")
        super().__init__(
            name=config.weights,
            sample_rate=SAMPLE_RATE,
            frame_rate_hz=SAMPLE_RATE / HOP_SAMPLES / PATCH_FRAMES,
            first_frame_s=(PATCH_FRAMES - 1) / 2 * HOP_SAMPLES / SAMPLE_RATE,
            dim=model.dim * len(layers),
            num_layers=num_layers,
            depends_on_padding=True,
            settings={"type": "atst", "layers": layers, "piece_frames": model.num_positions * PATCH_FRAMES},
        )
        self.model, self.layers, self.num_parts = model, layers, len(layers)

    def num_frames(self, samples: int) -> int:
        """See Teacher.num_frames: floor((floor(S / 160) + 1) / 4); at least 513 samples."""
        return (samples // HOP_SAMPLES + 1) // PATCH_FRAMES if samples > FFT_SAMPLES // 2 else 0

    def encode(self, audio: Tensor, lens: Tensor) -> TeacherOutput:
        """See Teacher.encode; all items have the same length."""
        options: dict[str, Any] = {"fft_samples": FFT_SAMPLES, "low_hz": LOW_HZ, "high_hz": HIGH_HZ, "top_db": TOP_DB}
        mel = torch.stack([decibel_mel(item, num_mel_bins=NUM_MEL_BINS, sample_rate=SAMPLE_RATE, **options) for item in audio])
        mel = 2 * (mel - LOWEST) / (HIGHEST - LOWEST) - 1
        patches = mel[:, :, : mel.shape[2] // PATCH_FRAMES * PATCH_FRAMES].unflatten(2, (-1, PATCH_FRAMES))  # (N, F, T, 4)
        patches = patches.permute(0, 2, 1, 3).flatten(2)  # (N, T, F 4)
        features = torch.cat([self._piece(piece) for piece in patches.split(self.model.num_positions, dim=1)], dim=1)
        return TeacherOutput(features, torch.tensor([self.num_frames(n) for n in lens.tolist()]))

    def _piece(self, patches: Tensor) -> Tensor:
        states = self.model(patches)
        return torch.cat([states[layer] for layer in self.layers], dim=2)


class FrameTransformer(nn.Module):
    """A pre-norm Transformer over patches with learned positions, sized by its weights.

    Args:
        state: tensors by the authors' names.
    """

    def __init__(self, state: dict[str, Tensor]) -> None:
        super().__init__()
        self.dim = int(state["norm_frame.weight"].shape[0])
        self.num_positions = int(state["pos_embed"].shape[1]) - 1
        depth = 1 + max(int(name.split(".")[1]) for name in state if name.startswith("blocks."))
        hidden, bias = int(state["blocks.0.mlp.fc1.weight"].shape[0]), "blocks.0.attn.qkv.bias" in state
        self.patch_embed = nn.ModuleDict({"patch_embed": nn.Linear(int(state["patch_embed.patch_embed.weight"].shape[1]), self.dim)})
        self.pos_embed = nn.Parameter(torch.zeros(1, self.num_positions + 1, self.dim))
        self.blocks = nn.ModuleList(_Block(self.dim, hidden, bias) for _ in range(depth))
        self.norm_frame = nn.LayerNorm(self.dim, eps=1e-6)
        names = self.state_dict()
        self.load_state_dict({name: state[name] for name in names})

    def forward(self, patches: Tensor) -> list[Tensor]:
        """(N, T, D) per layer of patches (N, T, F 4), T at most `num_positions`: the first block's input, then normed outputs."""
        x = self.patch_embed["patch_embed"](patches) + self.pos_embed[:, 1 : patches.shape[1] + 1]
        states = [x]
        for block in self.blocks:
            x = block(x)
            states.append(self.norm_frame(x))
        return states


class _Block(nn.Module):
    """``x + attention(norm1(x))``, then ``x + mlp(norm2(x))``."""

    def __init__(self, dim: int, hidden: int, bias: bool) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim, eps=1e-6), nn.LayerNorm(dim, eps=1e-6)
        self.attn = nn.ModuleDict({"qkv": nn.Linear(dim, 3 * dim, bias=bias), "proj": nn.Linear(dim, dim)})
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(dim, hidden), "fc2": nn.Linear(hidden, dim)})
        self.num_heads = max(1, dim // HEAD_DIM)

    def forward(self, x: Tensor) -> Tensor:
        """(N, T, D)."""
        query, key, value = self.attn["qkv"](self.norm1(x)).unflatten(2, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        x = x + self.attn["proj"](F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2))
        return x + self.mlp["fc2"](F.gelu(self.mlp["fc1"](self.norm2(x))))  # type: ignore[no-any-return]


def read_weights(name: str, folder: Path | None) -> dict[str, Tensor]:
    """Tensors of the encoder in a checkpoint, without the prefix of the branch they are in.

    Raises:
        ConfigError: no such file, or it holds no such encoder.
    """
    values = read_checkpoint(name, folder)
    state = values.get("state_dict", values) if isinstance(values, dict) else {}
    for prefix in PREFIXES:
        if f"{prefix}pos_embed" in state:
            return {key[len(prefix) :]: value for key, value in state.items() if key.startswith(prefix) and isinstance(value, Tensor)}
    raise ConfigError(f"`weights` {name} must hold an ATST-Frame encoder with `pos_embed`, but do not")
