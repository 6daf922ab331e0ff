"""Settings of the export stage."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from spear.errors import ConfigError


@dataclass(frozen=True, kw_only=True, slots=True)
class ExportConfig:
    """Which weights become the exported encoder, and what its card says."""

    use: Literal["average", "last"] = "average"
    """``average``: the mean of the weights over a stretch of training; ``last``: the weights of the checkpoint as they are."""
    step: int | None = None
    """Checkpoint to export; none: the last one."""
    start_step: int | None = None
    """With ``use: average``: the mean is over the steps after this checkpoint, 0 for all of training; none: `average_share` decides."""
    average_share: float = 0.25
    """With ``use: average`` and no `start_step`: about this last share of the steps is averaged, from the checkpoint nearest to its start."""
    name: str | None = None
    """Title of the model card; none: the name of the run's folder."""
    licence: str | None = None
    """Licence of the weights as an SPDX word; none: the card says that it is still open."""
    licence_notes: tuple[str, ...] = ()
    """Sentences for the card, e.g. what the licences of teachers and corpora ask for."""

    def __post_init__(self) -> None:
        for name, value in (("step", self.step), ("start_step", self.start_step)):
            if value is not None and value < 0:
                raise ConfigError(f"`{name}` must be 0 or more, but is {value}")
        if not 0 < self.average_share <= 1:
            raise ConfigError(f"`average_share` must be more than 0 and at most 1, but is {self.average_share}")
        if self.start_step is not None and self.use != "average":
            raise ConfigError(f"`start_step` needs `use: average`, but `use` is {self.use}")
        if self.start_step is not None and self.step is not None and self.start_step >= self.step:
            raise ConfigError(f"`start_step` must be smaller than `step`, but is {self.start_step} and not below {self.step}")
