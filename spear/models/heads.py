"""Prediction heads over a student's features."""

from __future__ import annotations

from torch import Tensor, nn


class CodebookHead(nn.Module):
    """One linear that predicts every codebook's entry of a frame."""

    def __init__(self, dim: int, num_codebooks: int, codebook_size: int) -> None:
        super().__init__()
        self.num_codebooks, self.codebook_size = num_codebooks, codebook_size
        self.proj = nn.Linear(dim, num_codebooks * codebook_size)

    def forward(self, x: Tensor) -> Tensor:
        """x: (N, T, D) -> logits (N, T, C, K) float32."""
        return self.proj(x).float().unflatten(-1, (self.num_codebooks, self.codebook_size))  # type: ignore[no-any-return]
