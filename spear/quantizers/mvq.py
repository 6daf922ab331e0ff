"""Multi-codebook vector quantisation: a frame is the sum of one entry from each of C codebooks."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional

from spear.errors import ConfigError, DataError
from spear.files import seed_from
from spear.quantizers.base import Quantizer, take_normalizer
from spear.quantizers.merge_search import Tables
from spear.quantizers.normalize import Normalizer
from spear.quantizers.search import block_frames, errors, frame_costs, make_tables, refine, sweep

SCALE_SPEED = 10.0
"""Scales are stored as log(scale) / SCALE_SPEED, so that they learn faster than the weights."""
_KEYS = ("centers", "centers_scale", "id_buf", "logits_scale", "to_logits.bias", "to_logits.weight")
_ROW_MULTIPLE = 32
_FAR = 100.0
_BEST_ROUNDS, _BEST_SWEEPS = 10, 4
_FAST_ROUNDS, _FAST_SWEEPS = 1, 3

SearchMode = Literal["exact", "best", "fast"]
"""How `MVQ.encode` looks for codes. exact: as multi_quantization does. best: from two starts, ten rounds each, the lowest error of all
rounds. fast: no predictor, three sweeps of coordinate descent and one round."""


def check_power_of_two(name: str, value: int) -> None:
    """Raise ConfigError unless `value`, a setting called `name`, is 1, 2, 4, 8, ..."""
    if value < 1 or value & (value - 1):
        raise ConfigError(f"`{name}` must be a power of two, but is {value}")


class MVQ(Quantizer):
    """Direct-sum codebooks with a linear predictor of the codes and a pairwise merge search.

    Weights are those of multi_quantization 0.1.1 (k2-fsa): ``to_logits`` (C*K, D), ``centers`` (C, K, D), two log scales and
    an identity of eight hexadecimal digits. A codebook fitted on little data uses only its first `entries` entries; the rest
    are zeros and are never chosen.
    Source: arXiv:2211.00508; the search of multi_quantization in table form, see `spear.quantizers.search`.

    Args:
        dim: D. num_codebooks: C, a power of two. codebook_size: K, a power of two.
        normalizer: channel normalisation, or None. entries: entries in use, a power of two; None: all.
        seed: decides the initial weights and the identity. mode: how `encode` searches, saved with the weights.
    Raises:
        ConfigError: a size is not a power of two, or `mode` is unknown.
    """

    kind: ClassVar[str] = "mvq"
    id_buf: Tensor

    def __init__(
        self,
        dim: int,
        num_codebooks: int,
        codebook_size: int = 256,
        *,
        normalizer: Normalizer | None = None,
        entries: int | None = None,
        seed: int = 0,
        mode: SearchMode = "exact",
    ) -> None:
        super().__init__(dim, num_codebooks, codebook_size, normalizer)
        if mode not in get_args(SearchMode):
            raise ConfigError(f"`search` must be exact, best or fast, but is {mode}")
        self.mode: SearchMode = mode
        self.entries = codebook_size if entries is None else entries
        for name, value in (("num_codebooks", num_codebooks), ("codebook_size", codebook_size), ("entries", self.entries)):
            check_power_of_two(name, value)
        if self.entries > codebook_size:
            raise ConfigError(f"`entries` must be at most `codebook_size` {codebook_size}, but is {self.entries}")
        generator = torch.Generator().manual_seed(seed_from(seed, "mvq weights"))
        bound = dim**-0.5
        weight = torch.empty(num_codebooks * codebook_size, dim).uniform_(-bound, bound, generator=generator)
        bias = torch.empty(num_codebooks * codebook_size).uniform_(-bound, bound, generator=generator)
        self.to_logits = nn.Linear(dim, num_codebooks * codebook_size, device="meta")
        self.to_logits.weight, self.to_logits.bias = nn.Parameter(weight), nn.Parameter(bias)
        self.centers = nn.Parameter(weight.detach().clone().view(num_codebooks, codebook_size, dim))
        self.logits_scale = nn.Parameter(torch.zeros(()))
        self.centers_scale = nn.Parameter(torch.zeros(()))
        self.register_buffer("id_buf", torch.tensor(list(f"{seed_from(seed, 'mvq id') & 0xFFFFFFFF:08x}".encode()), dtype=torch.uint8))
        self._tables: Tables | None = None
        self._tables_of: tuple[object, ...] = ()
        self.requires_grad_(False)

    @property
    def id(self) -> str:
        """Eight hexadecimal digits that token files of multi_quantization carry."""
        return bytes(self.id_buf.tolist()).decode("ascii")

    def effective_centers(self) -> Tensor:
        """Scaled centres of the entries in use, (C, entries, D)."""
        return (SCALE_SPEED * self.centers_scale).exp() * self.centers[:, : self.entries]

    def data_mean(self) -> Tensor:
        """Mean of all sums of entries, (D,): the model's guess of the mean of the normalised data."""
        return self.effective_centers().detach().mean(dim=1).sum(dim=0)

    def logits(self, frames: Tensor) -> Tensor:
        """Predicted log-odds (M, C, entries) of the codes of normalised frames (M, D)."""
        scores: Tensor = self.to_logits((SCALE_SPEED * self.logits_scale).exp() * frames)
        return scores.view(-1, self.num_codebooks, self.codebook_size)[:, :, : self.entries]

    def tables(self) -> Tables:
        """Search tables of the present centres, made once per change of the weights."""
        key = (_version(self.centers), _version(self.centers_scale), self.centers.data_ptr(), self.centers.device)
        if self._tables is None or key != self._tables_of:
            with torch.no_grad():
                self._tables, self._tables_of = make_tables(self.effective_centers(), overwrite=True), key
        return self._tables

    def search(self, frames: Tensor, refine_iters: int) -> Tensor:
        """Codes (M, C) int64 of normalised frames (M, D): the predicted ones, refined `refine_iters` times."""

        def exact(rows: Tensor, count: int) -> Tensor:
            codes = self.logits(rows).argmax(dim=-1)[:count]
            return refine(self.tables(), frame_costs(self.tables(), rows)[:count], codes, refine_iters) if refine_iters else codes

        return self._in_blocks(frames, exact)

    def search_best(self, frames: Tensor) -> Tensor:
        """Codes (M, C) int64 of normalised frames (M, D): the lowest error found from the predicted codes and from coordinate descent."""

        def best(rows: Tensor, count: int) -> Tensor:
            tables = self.tables()
            costs = frame_costs(tables, rows)[:count]
            starts = (self.logits(rows).argmax(dim=-1)[:count], sweep(tables, costs, None, _BEST_SWEEPS))
            first, second = (refine(tables, costs, codes, _BEST_ROUNDS, keep_best=True) for codes in starts)
            better = errors(tables, costs, second) < errors(tables, costs, first)
            return torch.where(better[:, None], second, first)

        return self._in_blocks(frames, best)

    def search_fast(self, frames: Tensor) -> Tensor:
        """Codes (M, C) int64 of normalised frames (M, D): coordinate descent and one round of the merge search."""

        def fast(rows: Tensor, count: int) -> Tensor:
            costs = frame_costs(self.tables(), rows)[:count]
            return refine(self.tables(), costs, sweep(self.tables(), costs, None, _FAST_SWEEPS), _FAST_ROUNDS)

        return self._in_blocks(frames, fast)

    @torch.no_grad()
    def _in_blocks(self, frames: Tensor, codes_of: Callable[[Tensor, int], Tensor]) -> Tensor:
        """`codes_of` padded blocks of frames, where the second argument says how many rows are frames."""
        found = []
        for block in frames.split(block_frames(frames.device, self.num_codebooks, self.entries)):
            # Matrix products of other shapes may round differently. Whole multiples of rows keep a frame's codes the same in any company.
            padded = functional.pad(block, (0, 0, 0, -len(block) % _ROW_MULTIPLE))
            found.append(codes_of(padded, len(block)))
        return torch.cat(found) if found else torch.empty(0, self.num_codebooks, dtype=torch.int64, device=frames.device)

    def encode(self, frames: Tensor, refine_iters: int = 5) -> Tensor:
        """Codes (..., C) uint8 (int16 where K > 256) of teacher frames (..., D), searched for as `mode` says.

        Compiled loops and torch give the same codes (see `spear.quantizers.search`). Matrix products, though, round as the machine's
        library does: where two entries are equally good to about seven digits, another machine may choose the other.

        Args:
            refine_iters: exact: rounds of the search after the first guess; 5 is what SPEAR stores, 0 is the guess alone.
        Raises:
            DataError: the width is not D, or a value is not finite. ConfigError: `refine_iters` is negative.
        """
        if refine_iters < 0:
            raise ConfigError(f"`refine_iters` must be 0 or more, but is {refine_iters}")
        rows = self.normalize(frames)
        if self.mode == "exact":
            codes = self.search(rows, refine_iters)
        else:
            codes = {"best": self.search_best, "fast": self.search_fast}[self.mode](rows)
        return codes.view(*frames.shape[:-1], self.num_codebooks).to(self.code_dtype)

    @torch.no_grad()
    def reconstruct(self, codes: Tensor) -> Tensor:
        """Sums of entries (M, D) for codes (M, C) int64, in the normalised domain."""
        rows = codes + torch.arange(self.num_codebooks, device=codes.device) * self.codebook_size
        flat = self.centers.detach().flatten(0, 1)
        return functional.embedding_bag(rows, flat, mode="sum") * (SCALE_SPEED * self.centers_scale).exp()

    def settings(self) -> dict[str, Any]:
        """Entries in use, the identity, and the search where it is not the exact one."""
        return {"entries": self.entries, "id": self.id, **({} if self.mode == "exact" else {"search": self.mode})}

    @classmethod
    def from_state(cls, config: dict[str, Any], state: dict[str, Tensor]) -> MVQ:
        """See `Quantizer.from_state`."""
        sizes = (config["dim"], config["num_codebooks"], config["codebook_size"])
        mode = config.get("search", "exact")
        quantizer = cls(*sizes, normalizer=take_normalizer(config, state), entries=config["entries"], mode=mode)
        quantizer.load_state_dict(state)
        return quantizer

    @classmethod
    def from_multi_quantization(cls, state: Mapping[str, Any], *, mean: Tensor | None = None, std: Tensor | None = None) -> MVQ:
        """Take over the state dict of a k2-fsa multi_quantization ``Quantizer``.

        Args:
            state: its six tensors, or the dictionary {"quantizer", "mean", "std"} that icefall's scripts store.
            mean, std: (D,) channel statistics that frames were normalised with before the quantizer; None: none were.
        Raises:
            DataError: a tensor is missing or has another shape than the centres say.
        """
        if "quantizer" in state:
            return cls.from_multi_quantization(state["quantizer"], mean=state.get("mean"), std=state.get("std"))
        missing = [key for key in _KEYS if key not in state]
        if missing:
            raise DataError(f"a multi_quantization state must have `{missing[0]}`, but has {', '.join(sorted(state)) or 'nothing'}")
        if state["centers"].dim() != 3:
            raise DataError(f"`centers` must have 3 dimensions, but has shape {tuple(state['centers'].shape)}")
        if (mean is None) != (std is None):
            raise DataError("`mean` and `std` must be given together, but one of them is missing")
        normalizer = None if mean is None or std is None else Normalizer(mean.flatten(), std.flatten())
        num, size, dim = state["centers"].shape
        quantizer = cls(dim, num, size, normalizer=normalizer)
        own = quantizer.state_dict()
        for key in _KEYS:
            if state[key].shape != own[key].shape:
                raise DataError(f"`{key}` must have shape {tuple(own[key].shape)}, but has {tuple(state[key].shape)}")
        quantizer.load_state_dict({**own, **{key: state[key] for key in _KEYS}})
        return quantizer

    def to_multi_quantization(self) -> dict[str, Tensor]:
        """State dict for the k2-fsa package. It takes normalised frames: apply `normalizer`, where there is one, before it.

        Entries not in use are put far from all data and given no chance, as the package has no notion of them.
        """
        state = {key: value.detach().clone() for key, value in self.state_dict().items() if key in _KEYS}
        if self.entries < self.codebook_size:
            used = state["centers"][:, : self.entries]
            middle = used.mean(dim=1, keepdim=True)
            far = torch.full_like(middle, _FAR * float((used - middle).norm(dim=-1).max() + 1.0))
            state["centers"][:, self.entries :: 2] = middle + far
            state["centers"][:, self.entries + 1 :: 2] = middle - far
            rows = state["to_logits.weight"].view(self.num_codebooks, self.codebook_size, self.dim)
            rows[:, self.entries :] = 0.0
            state["to_logits.bias"].view(self.num_codebooks, self.codebook_size)[:, self.entries :] = -1e9
        return state

    def correlations(self) -> Tensor:
        """How far codebooks share directions, (C, C) float64 in [0, 1] with unit diagonal; 0 off it is orthogonal.

        With S_c = X_c^T X_c of the centred entries X_c: tr(S_i S_j) / sqrt(tr(S_i^2) tr(S_j^2)).
        """
        centred = self.effective_centers().detach().double()
        flat = (centred - centred.mean(dim=1, keepdim=True)).flatten(0, 1)
        shape = (self.num_codebooks, self.entries, self.num_codebooks, self.entries)
        traces = (flat @ flat.T).square().view(shape).sum(dim=(1, 3))
        own = traces.diagonal().clamp(min=torch.finfo(torch.float64).tiny).sqrt()
        found = traces / own[:, None] / own[None, :]
        return found.fill_diagonal_(1.0)


def _version(tensor: Tensor) -> int:
    """Counts in-place changes; tensors made in inference mode cannot be changed outside it and have no counter."""
    return 0 if tensor.is_inference() else tensor._version
