"""Compare MVQ with multi_quantization 0.1.1 and faiss in one process: encoding and training steps interleaved, fits one after the other.

python tools/bench_mvq.py encode --dim 1024 --num-codebooks 16
python tools/bench_mvq.py step --dim 256 --num-codebooks 8
python tools/bench_mvq.py fit --frames frames.safetensors --iters 3000    # a tensor `frames` (M, D); without it, a synthetic mixture
All times are CPU seconds of one thread. faiss is left out where it is not installed.
"""

from __future__ import annotations

import argparse
import importlib.util
import resource
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import multi_quantization  # type: ignore[import-untyped]
import torch
from torch import Tensor

from spear.files import read_tensors
from spear.quantizers import MVQ
from spear.quantizers.mvq_fit import MVQConfig
from spear.quantizers.mvq_reference import TwoPhaseTrainer

BITS = 8


def mixture(num_frames: int, dim: int) -> Tensor:
    """Frames (M, D) of a mixture of 512 Gaussians with 8 covariances of falling spectra, seeded."""
    generator = torch.Generator().manual_seed(0)
    centres = 0.5 * torch.randn(512, dim, generator=generator)
    shapes = torch.randn(8, dim, dim, generator=generator) * dim**-0.5 * torch.logspace(0, -1.5, dim)
    which = torch.randint(512, (num_frames,), generator=generator)
    frames = centres[which]
    noise = torch.randn(num_frames, dim, generator=generator)
    for kind, shape in enumerate(shapes):
        rows = which % 8 == kind
        frames[rows] += noise[rows] @ shape.T
    return frames


def seconds(work: Callable[[], object]) -> float:
    """CPU seconds of one call."""
    start = time.process_time()
    work()
    return time.process_time() - start


def relative_error(found: Tensor, frames: Tensor) -> float:
    """Squared error of reconstructions relative to the spread around the mean."""
    return float((found - frames).double().square().sum() / (frames - frames.mean(dim=0)).double().square().sum())


def theirs_of(quantizer: MVQ) -> Any:
    """The same weights in the other package."""
    theirs = multi_quantization.Quantizer(quantizer.dim, quantizer.codebook_size, quantizer.num_codebooks)
    theirs.load_state_dict(quantizer.to_multi_quantization())
    return theirs


def bench_encode(quantizer: MVQ, frames: Tensor, options: argparse.Namespace) -> None:
    """A line per search: time per frame, ratio to the reference, share of frames with its indexes, error relative to its error."""
    theirs, rows = theirs_of(quantizer), quantizer.normalize(frames)
    few = rows[: max(1, options.reference_frames)]
    searches: dict[str, Callable[[Tensor], Tensor]] = {
        "exact": lambda x: quantizer.search(x, options.refine_iters),
        "best": quantizer.search_best,
        "fast": quantizer.search_fast,
    }
    times: dict[str, list[float]] = {name: [] for name in ("reference", *searches)}
    with torch.no_grad():
        for search in searches.values():
            search(few)
        for _ in range(options.repeats):
            times["reference"].append(1e6 * seconds(lambda: theirs.encode(few, options.refine_iters)) / len(few))
            for name, search in searches.items():
                times[name].append(1e6 * seconds(lambda search=search: search(rows)) / len(rows))  # type: ignore[misc]
        expected = theirs.encode(few, options.refine_iters, as_bytes=False).long()
    reference = relative_error(quantizer.reconstruct(expected), few)
    print(f"| encode D={quantizer.dim} C={quantizer.num_codebooks} K={quantizer.codebook_size} | us/frame | ratio | identical | error |")
    print(f"| --- | --- | --- | --- | --- |\n| multi_quantization | {statistics.median(times['reference']):.0f} | 1 | | {reference:.4f} |")
    for name, search in searches.items():
        ratio = statistics.median(a / b for a, b in zip(times["reference"], times[name]))
        codes = search(few)
        same, error = float((codes == expected).all(dim=1).double().mean()), relative_error(quantizer.reconstruct(codes), few)
        print(f"| {name} | {statistics.median(times[name]):.1f} | {ratio:.1f} | {100 * same:.1f} % | {error:.4f} |")


def bench_step(frames: Tensor, options: argparse.Namespace) -> None:
    """Ratio of the time of one training step in both phases: the other package's trainer and ours, on the same batches."""
    dim, num = frames.shape[1], options.num_codebooks
    theirs = multi_quantization.QuantizerTrainer(dim=dim, bytes_per_frame=num, device=torch.device("cpu"), phase_one_iters=2, phase_two_iters=10**6)
    ours = TwoPhaseTrainer(dim, num, phase_one_iters=2, phase_two_iters=10**6, seed=0)
    batch = options.batch_frames
    ratios: list[list[float]] = [[], []]
    for step in range(3 + options.repeats):
        rows = frames[step * batch % (len(frames) - batch) :][:batch]
        phase = 0 if ours.in_phase_one else 1
        iters = 1 + step % 2
        multi_quantization.quantization.random.random = lambda iters=iters: 0.0 if iters == 2 else 1.0  # both refine as often
        ratios[phase].append(seconds(lambda rows=rows: theirs.step(rows)) / seconds(lambda rows=rows, iters=iters: ours.step(rows, iters)))  # type: ignore[misc]
    for phase, found in enumerate(ratios):
        print(f"training step, phase {phase + 1}, D={dim} C={num}: ratio {statistics.median(found[1:] or found):.1f}")


def bench_fit(train: Tensor, heldout: Tensor, options: argparse.Namespace) -> None:
    """A line per fit: CPU seconds and relative error of held-out frames; the reference schedule runs on our search."""
    print("| fit | CPU s | held-out error |\n| --- | --- | --- |")
    for solver in ("alternating", "reference") if options.iters else ("alternating",):
        config = MVQConfig(num_codebooks=options.num_codebooks, solver=solver, phase_one_iters=options.iters or 1, phase_two_iters=options.iters or 1)
        start = time.process_time()
        quantizer = config.fit(train, heldout, seed=options.seed)
        taken, rows = time.process_time() - start, quantizer.normalize(heldout)
        name = f"reference {options.iters}+{options.iters}" if solver == "reference" else "default"
        print(f"| {name} | {taken:.1f} | {relative_error(quantizer.reconstruct(quantizer.search(rows, 5)), rows):.4f} |", flush=True)
        if solver == "alternating":
            normalize = quantizer.normalize
    if importlib.util.find_spec("faiss") is not None:
        bench_faiss(normalize(train), normalize(heldout), options.num_codebooks)


def bench_faiss(train: Tensor, heldout: Tensor, num_codebooks: int) -> None:
    """The same table's lines for faiss: residual, local-search and product quantization at equal bits."""
    import faiss

    faiss.omp_set_num_threads(1)
    dim = train.shape[1]
    kinds = {
        "faiss product": lambda: faiss.ProductQuantizer(dim, num_codebooks, BITS),
        "faiss residual": lambda: faiss.ResidualQuantizer(dim, num_codebooks, BITS),
        "faiss local search": lambda: faiss.LocalSearchQuantizer(dim, num_codebooks, BITS),
    }
    for name, make in kinds.items():
        if name == "faiss product" and dim % num_codebooks:
            continue
        quantizer = make()
        taken = seconds(lambda quantizer=quantizer: quantizer.train(train.numpy()))  # type: ignore[misc]
        found = torch.from_numpy(quantizer.decode(quantizer.compute_codes(heldout.numpy())))
        print(f"| {name} | {taken:.1f} | {relative_error(found, heldout):.4f} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["encode", "step", "fit"])
    parser.add_argument("--dim", type=int, default=256)
    parser.add_argument("--num-codebooks", type=int, default=8)
    parser.add_argument("--num-frames", type=int, default=20000, help="of the synthetic mixture")
    parser.add_argument("--frames", type=Path, help="safetensors file with a tensor `frames` (M, D)")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--encode-frames", type=int, default=2048)
    parser.add_argument("--reference-frames", type=int, default=200, help="encoded by multi_quantization")
    parser.add_argument("--refine-iters", type=int, default=5)
    parser.add_argument("--batch-frames", type=int, default=600)
    parser.add_argument("--iters", type=int, default=0, help="steps per phase of the reference fit; 0: leave it out")
    parser.add_argument("--rounds", type=int, default=2, help="rounds of the short fit whose codebooks are encoded with")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    frames = read_tensors(options.frames)["frames"].float() if options.frames else mixture(options.num_frames, options.dim)
    num_heldout = min(2000, len(frames) // 10)
    train, heldout = frames[:-num_heldout], frames[-num_heldout:]
    if options.what == "encode":
        short = MVQConfig(num_codebooks=options.num_codebooks, frames_per_entry=1, rounds=options.rounds, polish_rounds=0)
        bench_encode(short.fit(train, heldout, seed=options.seed), frames[: options.encode_frames], options)
    elif options.what == "step":
        bench_step(frames, options)
    else:
        bench_fit(train, heldout, options)
    print(f"peak memory of the process: {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024:.0f} MB")


if __name__ == "__main__":
    main()
