"""Compare MVQ with multi_quantization 0.1.1 in one process: encoding side by side, and the two fits on the same frames.

python tools/bench_mvq.py --dim 256 --num-codebooks 8
python tools/bench_mvq.py --fit --frames frames.safetensors     # a tensor `frames` (M, D); without it, a synthetic mixture
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import multi_quantization  # type: ignore[import-untyped]
import torch
from torch import Tensor

from spear.files import read_tensors
from spear.quantizers import MVQ
from spear.quantizers.card import card
from spear.quantizers.mvq_fit import MVQConfig


def mixture(num_frames: int, dim: int) -> Tensor:
    """Frames (M, D) of a Gaussian mixture of 512 components, seeded."""
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(512, dim, generator=generator)
    which = torch.randint(512, (num_frames,), generator=generator)
    return centres[which] + 0.7 * torch.randn(num_frames, dim, generator=generator)


def seconds(work: Callable[[], object]) -> float:
    """CPU seconds of one call."""
    start = time.process_time()
    work()
    return time.process_time() - start


def bench_encode(quantizer: MVQ, frames: Tensor, repeats: int, iters: int) -> None:
    """Print microseconds per frame of both, interleaved, and the share of frames with the same indexes."""
    theirs = multi_quantization.Quantizer(quantizer.dim, quantizer.codebook_size, quantizer.num_codebooks)
    theirs.load_state_dict(quantizer.to_multi_quantization())
    rows = quantizer.normalize(frames)
    few = rows[: max(1, len(rows) // 5)]
    quantizer.search(few, iters)
    ours_us, theirs_us, ratios = [], [], []
    with torch.no_grad():
        for _ in range(repeats):
            theirs_us.append(1e6 * seconds(lambda: theirs.encode(few, iters)) / len(few))
            ours_us.append(1e6 * seconds(lambda: quantizer.search(rows, iters)) / len(rows))
            ratios.append(theirs_us[-1] / ours_us[-1])
        same = (theirs.encode(few, iters, as_bytes=False) == quantizer.search(few, iters)).all(dim=1).double().mean()
    print(f"encode, D={quantizer.dim} C={quantizer.num_codebooks} K={quantizer.codebook_size}, {iters} iterations, median of {repeats}:")
    print(f"  multi_quantization {statistics.median(theirs_us):9.1f} us/frame ({len(few)} frames)")
    print(f"  spear              {statistics.median(ours_us):9.1f} us/frame ({len(rows)} frames)")
    print(f"  ratio {statistics.median(ratios):.1f}x, identical frames {100 * float(same):.2f} %")


def bench_fit(train: Tensor, heldout: Tensor, num_codebooks: int, iters: int) -> None:
    """Print CPU seconds and held-out relative loss of both solvers; the reference one runs on the table search too."""
    for solver in ("alternating", "reference"):
        config = MVQConfig(num_codebooks=num_codebooks, solver=solver, phase_one_iters=iters, phase_two_iters=iters)
        start = time.process_time()
        quantizer = config.fit(train, heldout, seed=0)
        taken = time.process_time() - start
        schedule = f" {iters}+{iters} steps" if solver == "reference" else ""
        print(f"fit, {solver}{schedule}: {taken:.1f} CPU s on {len(train)} frames, relative loss {card(quantizer, heldout)['relative_loss']:.4f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dim", type=int, default=256)
    parser.add_argument("--num-codebooks", type=int, default=8)
    parser.add_argument("--num-frames", type=int, default=20000)
    parser.add_argument("--frames", type=Path, help="safetensors file with a tensor `frames` (M, D)")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--encode-frames", type=int, default=1000)
    parser.add_argument("--refine-iters", type=int, default=5)
    parser.add_argument("--fit", action="store_true", help="compare the fits too")
    parser.add_argument("--fit-iters", type=int, default=1000, help="steps per phase of the reference fit")
    parser.add_argument("--rounds", type=int, default=2, help="rounds of the short fit whose codebooks are encoded with")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    frames = read_tensors(arguments.frames)["frames"].float() if arguments.frames else mixture(arguments.num_frames, arguments.dim)
    num_heldout = min(2000, len(frames) // 10)
    train, heldout = frames[:-num_heldout], frames[-num_heldout:]
    short = MVQConfig(num_codebooks=arguments.num_codebooks, frames_per_entry=1, rounds=arguments.rounds, polish_rounds=0)
    bench_encode(short.fit(train, heldout, seed=0), frames[: arguments.encode_frames], arguments.repeats, arguments.refine_iters)
    if arguments.fit:
        bench_fit(train, heldout, arguments.num_codebooks, arguments.fit_iters)


if __name__ == "__main__":
    main()
