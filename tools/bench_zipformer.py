"""Compare the Zipformer encoder with icefall's own, side by side in one process, with the same weights, inputs and schedules.

pip install --no-deps zipformer==0.1.3     # icefall's implementation as a package of the Next-gen Kaldi team, Apache-2.0
python tools/bench_zipformer.py --size 5m --mode train --precision bf16

Calls alternate; CPU seconds on a CPU, elapsed seconds between synchronisations on a GPU; medians of the repeats. `utilisation` is the rate of
the products in the model (counted by torch) against that of a large matrix product of the same precision, measured in between.
"""

from __future__ import annotations

import argparse
import gc
import importlib
import importlib.util
import multiprocessing
import statistics
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from spear.models.zipformer import ZipformerConfig, ZipformerEncoder

SIZES: dict[str, dict[str, Any]] = {
    "base": {},
    "5m": {"num_encoder_layers": 1, "encoder_dim": 144, "encoder_unmasked_dim": 144, "feedforward_dim": 432, "num_heads": 4},
    "mini": {
        "downsampling_factor": (2, 4, 2),
        "num_encoder_layers": 1,
        "encoder_dim": 128,
        "encoder_unmasked_dim": 128,
        "feedforward_dim": 384,
        "num_heads": 4,
        "cnn_module_kernel": (31, 15, 31),
        "conv_channels": (8, 8, 16),
    },
}
BATCH_COUNT = 20000.0
"""Point of all schedules: the state of late training."""


def reference_modules() -> tuple[ModuleType, ModuleType]:
    """The package's modules `zipformer` and `subsampling`, without its own imports of decoders and exporters."""
    spec = importlib.util.find_spec("zipformer")
    if spec is None or spec.submodule_search_locations is None:
        sys.exit("the reference is missing: pip install --no-deps zipformer==0.1.3")
    package, utils = ModuleType("zipformer"), ModuleType("zipformer.utils")
    package.__path__ = list(spec.submodule_search_locations)
    utils.__dict__["torch_autocast"] = lambda device_type="cuda", **options: torch.amp.autocast(device_type, **options)
    sys.modules.update({"zipformer": package, "zipformer.utils": utils})
    return importlib.import_module("zipformer.modules.zipformer"), importlib.import_module("zipformer.modules.subsampling")


class Reference(nn.Module):
    """icefall's front end and encoder with the arguments of a config."""

    def __init__(self, config: ZipformerConfig) -> None:
        super().__init__()
        encoder, front = reference_modules()
        stacks = config.stacks()
        first, second, third = config.conv_channels

        def each(name: str) -> tuple[int, ...]:
            return tuple(getattr(stack, name) for stack in stacks)

        self.encoder_embed = front.Conv2dSubsampling(
            config.num_mel_bins, stacks[0].dim, layer1_channels=first, layer2_channels=second, layer3_channels=third, dropout=0.1
        )
        self.encoder = encoder.Zipformer(
            output_downsampling_factor=2,
            downsampling_factor=each("downsampling"),
            encoder_dim=each("dim"),
            num_encoder_layers=each("num_layers"),
            encoder_unmasked_dim=each("unmasked_dim"),
            query_head_dim=each("query_head_dim"),
            pos_head_dim=each("pos_head_dim"),
            value_head_dim=each("value_head_dim"),
            num_heads=each("num_heads"),
            feedforward_dim=each("feedforward_dim"),
            cnn_module_kernel=each("kernel"),
            pos_dim=config.pos_dim,
        )
        for module in self.modules():
            if hasattr(module, "batch_count"):
                module.batch_count = BATCH_COUNT

    def forward(self, x: Tensor, lens: Tensor) -> Tensor:
        """x: (N, T, F), lens: (N,) -> (N, T / 4, D)."""
        x, lens = self.encoder_embed(x, lens)
        padding = torch.arange(x.shape[1], device=x.device) >= lens[:, None]
        out: Tensor = self.encoder(x.permute(1, 0, 2), lens, padding)[0]
        return out.permute(1, 0, 2)


def load_weights(ours: ZipformerEncoder, theirs: Reference) -> None:
    """Copy ours into theirs; every tensor must have a partner but the mask, the filler of the position product and the like."""
    missing, unexpected = theirs.load_state_dict(ours.state_dict(), strict=False)
    left = [name for name in [*missing, *unexpected] if name != "mask_emb"]
    if left:
        sys.exit(f"these tensors have no partner: {', '.join(left)}")


class Clock:
    """Seconds of one call: of the CPU, or elapsed with the GPU waited for."""

    def __init__(self, device: str) -> None:
        self.cuda = device == "cuda"

    def __call__(self, work: Callable[[], object]) -> float:
        """Seconds of `work()`."""
        start = self._now()
        work()
        return self._now() - start

    def _now(self) -> float:
        if self.cuda:
            torch.cuda.synchronize()
            return time.perf_counter()
        return time.process_time()


def autocast(device: str, precision: str) -> AbstractContextManager[Any]:
    """bf16 autocast or nothing."""
    return torch.autocast(device, dtype=torch.bfloat16) if precision == "bf16" else nullcontext()


def worker(model: nn.Module, x: Tensor, lens: Tensor, args: argparse.Namespace) -> Callable[[], object]:
    """One forward pass, or one forward and backward pass, of `model`."""

    def evaluate() -> Tensor:
        with torch.no_grad(), autocast(args.device, args.precision):
            return output_of(model, x, lens)

    # on a CPU the reference's own backward functions need autocast, which they switch on for GPUs only
    outside = autocast(args.device, args.precision) if isinstance(model, Reference) else nullcontext()

    def train() -> None:
        with outside:
            with autocast(args.device, args.precision):
                out = output_of(model, x, lens)
            (out.float() * 1e-3).square().sum().backward()  # type: ignore[no-untyped-call]
        for parameter in model.parameters():
            parameter.grad = None

    model.train(args.mode == "train")
    return train if args.mode == "train" else evaluate


def output_of(model: nn.Module, x: Tensor, lens: Tensor) -> Tensor:
    """The features of either implementation."""
    out = model(x, lens)
    return out if isinstance(out, Tensor) else out.features


def peak_flops(device: str, precision: str, clock: Clock) -> float:
    """Floating point operations a second of a product of two 2048 x 2048 matrices."""
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    a, b = (torch.randn(2048, 2048, device=device, dtype=dtype) for _ in range(2))
    a @ b
    return 2 * 2048**3 / min(clock(lambda: a @ b) for _ in range(3))


def count_flops(work: Callable[[], object], mode: str) -> float:
    """Operations of the products of one call; a backward pass counts twice its forward pass."""
    with FlopCounterMode(display=False) as counter:
        work()
    return float(counter.get_total_flops()) * (3 if mode == "train" else 1)


def peak_memory(reference: bool, args: argparse.Namespace) -> float:
    """GiB that one call needs beyond the model itself, in a fresh process of its own on a CPU."""
    context = multiprocessing.get_context("spawn")
    with context.Pool(1) as pool:
        return pool.apply(_memory_of_one_call, (reference, args))


def _memory_of_one_call(reference: bool, args: argparse.Namespace) -> float:
    torch.set_num_threads(args.threads)
    model, x, lens = made(args)[int(reference)], *inputs(args)
    if args.device == "cuda":
        before = torch.cuda.memory_allocated()
        worker(model, x, lens, args)()
        return (torch.cuda.max_memory_allocated() - before) / 2**30
    short = x[:1, :200]
    worker(model, short, lens[:1].clamp(max=200), args)()  # libraries and buffers that do not grow with the batch
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # the highest memory so far is forgotten (Linux)
    before = status_kib("VmRSS")
    worker(model, x, lens, args)()
    return (status_kib("VmHWM") - before) / 2**20


def status_kib(name: str) -> int:
    """One number of this process's status, in KiB (Linux)."""
    return next(int(line.split()[1]) for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))


def made(args: argparse.Namespace) -> tuple[ZipformerEncoder, Reference]:
    """Both implementations with the same weights."""
    torch.manual_seed(0)
    ours = ZipformerConfig(**SIZES[args.size], output_downsampling_factor=2).build().to(args.device)
    theirs = Reference(ours.config).to(args.device)
    load_weights(ours, theirs)
    ours.set_batch_count(BATCH_COUNT)
    return ours, theirs


def inputs(args: argparse.Namespace) -> tuple[Tensor, Tensor]:
    """Noise like log-mels (N, T, 128), and lengths (N,)."""
    x = torch.randn(args.batch, int(args.seconds * 100), 128, device=args.device) * 3 - 6
    return x, torch.full((args.batch,), x.shape[1], device=args.device)


def main() -> None:
    """Print one line per implementation and the ratio."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0] if __doc__ else None)
    parser.add_argument("--size", choices=sorted(SIZES), default="5m")
    parser.add_argument("--mode", choices=("train", "eval"), default="train")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--seconds", type=float, default=10.0, help="audio of an item")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--memory", action="store_true", help="measure the memory of one call, too")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    (ours, theirs), (x, lens) = made(args), inputs(args)
    clock = Clock(args.device)
    with torch.no_grad():
        difference = (output_of(ours.eval(), x, lens) - output_of(theirs.eval(), x, lens)).abs().max().item()
    forward = worker(ours, x, lens, argparse.Namespace(**{**vars(args), "mode": "eval"}))
    flops = count_flops(forward, args.mode)
    works = [worker(theirs, x, lens, args), worker(ours, x, lens, args)]
    for work in works:
        work()
    times: list[list[float]] = [[], []]
    peaks = []
    for _ in range(args.repeats):
        for seen, work in zip(times, works):
            seen.append(clock(work))
        peaks.append(peak_flops(args.device, args.precision, clock))
    peak = statistics.median(peaks)
    parameters = sum(p.numel() for p in ours.parameters()) / 1e6
    print(
        f"{args.size} ({parameters:.1f}M), {args.mode}, {args.precision}, {args.batch} x {args.seconds:g} s, {args.device}, {args.threads} thread(s)"
    )
    print(f"matrix products reach {peak / 1e9:.1f} GFLOP/s; outputs differ by at most {difference:.1e} in fp32 evaluation")
    for name, seen in zip(("icefall", "spear"), times):
        median = statistics.median(seen)
        print(f"  {name:8} {median:8.3f} s, utilisation {flops / median / peak:.3f}")
    ratios = [a / b for a, b in zip(*times)]
    print(f"  ratio {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})")

    if args.memory:
        needed = [peak_memory(reference, args) for reference in (True, False)]
        print(f"  memory of one call beyond the model: icefall {needed[0]:.2f} GiB, spear {needed[1]:.2f} GiB, ratio {needed[1] / needed[0]:.2f}")


if __name__ == "__main__":
    main()
