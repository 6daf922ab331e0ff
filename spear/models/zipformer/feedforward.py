"""Feed-forward module."""

from __future__ import annotations

from torch import Tensor

from spear.models.tracing import is_compiling
from spear.models.zipformer.balancer import Balancer
from spear.models.zipformer.chance import dropout_mask
from spear.models.zipformer.init import scaled
from spear.models.zipformer.linear import Linear, swoosh_linear
from spear.models.zipformer.scheduled_float import Schedule, ScheduledModule, schedule
from spear.models.zipformer.swoosh import swoosh_l
from spear.models.zipformer.whiten import Whiten


class FeedForward(ScheduledModule):
    """Two linears around SwooshL; the dropout mask between them is shared by all frames of an item."""

    def __init__(self, dim: int, hidden_dim: int, dropout: Schedule | float) -> None:
        super().__init__()
        self.dropout = dropout
        self.in_proj = Linear(dim, hidden_dim)
        self.out_proj = scaled(Linear(hidden_dim, dim), 0.1)
        self.hidden_balancer = Balancer(min_positive=0.3, max_positive=1.0, min_abs=0.75, max_abs=5.0)
        self.out_whiten = Whiten(schedule((0, 7.5), (20000, 15.0), default=7.5))

    def forward(self, x: Tensor) -> Tensor:
        """x: (N, T, D) -> (N, T, D)."""
        hidden = self.hidden_balancer(self.in_proj(x))
        if is_compiling():
            keep = self.later("dropout", hidden, self.out_proj.in_features, rescaled=True) if self.training else None
        else:
            keep = dropout_mask(hidden, self.value(self.dropout)) if self.training else None
        out: Tensor = self.out_whiten(swoosh_linear(hidden, keep, self.out_proj.weight, self.out_proj.bias, swoosh_l))
        return out
