"""Compare MVQ with multi_quantization 0.1.1 and faiss in one process. Calls are interleaved; medians of `--repeats`; CPU seconds of all threads.

python tools/bench_mvq.py fit --frames train.safetensors --num-codebooks 16 --keep KEPT    # fits one after the other; keeps their results
python tools/bench_mvq.py encode --frames train.safetensors --kept KEPT --threads 1 2
python tools/bench_mvq.py memory --frames train.safetensors --kept KEPT
python tools/bench_mvq.py step --dim 256 --num-codebooks 8

A file of frames has a tensor `train` (or `frames`) and perhaps `heldout`, (M, D) each; without a file, frames are a synthetic mixture.
faiss is left out where it is not installed.
"""

from __future__ import annotations

import argparse
import importlib.util
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import multi_quantization  # type: ignore[import-untyped]
import torch
from torch import Tensor

from spear.files import read_tensors
from spear.quantizers import MVQ, kernels, load_quantizer
from spear.quantizers.mvq_fit import MVQConfig
from spear.quantizers.mvq_reference import TwoPhaseTrainer

BITS = 8
FAISS = {"product": "IndexPQ", "residual": "IndexResidualQuantizer", "local search": "IndexLocalSearchQuantizer"}


class Times(NamedTuple):
    """CPU and elapsed seconds per frame of each repeat."""

    cpu: list[float]
    wall: list[float]


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


def read_split(options: argparse.Namespace) -> tuple[Tensor, Tensor]:
    """Training and held-out frames of the file, or of the mixture."""
    if not options.frames:
        frames = mixture(options.num_frames, options.dim)
    else:
        tensors = read_tensors(options.frames)
        if "heldout" in tensors:
            return tensors["train"].float(), tensors["heldout"].float()
        frames = tensors["train" if "train" in tensors else "frames"].float()
    num_heldout = min(2000, len(frames) // 10)
    return frames[:-num_heldout], frames[-num_heldout:]


def seconds(work: Callable[[], object]) -> tuple[float, float]:
    """CPU and elapsed seconds of one call."""
    start = time.process_time(), time.perf_counter()
    work()
    return time.process_time() - start[0], time.perf_counter() - start[1]


def errors(found: Tensor, frames: Tensor) -> Tensor:
    """Squared errors (M,) float64."""
    return (found - frames).double().square().sum(dim=1)


def relative_error(found: Tensor, frames: Tensor) -> float:
    """Squared error of reconstructions relative to the spread around the mean."""
    return float(errors(found, frames).sum() / (frames - frames.mean(dim=0)).double().square().sum())


def theirs_of(quantizer: MVQ) -> Any:
    """The same weights in the other package."""
    theirs = multi_quantization.Quantizer(quantizer.dim, quantizer.codebook_size, quantizer.num_codebooks)
    theirs.load_state_dict(quantizer.to_multi_quantization())
    return theirs


@contextmanager
def without_loops() -> Iterator[None]:
    """The search in plain torch."""
    loops = kernels.search_loops
    kernels.search_loops = lambda: None
    try:
        yield
    finally:
        kernels.search_loops = loops


def kept_faiss(options: argparse.Namespace) -> dict[str, Any]:
    """Indexes that `fit --keep` wrote."""
    if options.kept is None or importlib.util.find_spec("faiss") is None:
        return {}
    import faiss

    paths = {name: options.kept / f"{name.replace(' ', '_')}.faiss" for name in FAISS}
    return {f"faiss {name}": faiss.read_index(str(path)) for name, path in paths.items() if path.exists()}


def kept_mvq(options: argparse.Namespace, train: Tensor, heldout: Tensor) -> MVQ:
    """The quantizer that `fit --keep` wrote, else one of a short fit."""
    if options.kept is None:
        return MVQConfig(num_codebooks=options.num_codebooks, frames_per_entry=1, rounds=2, epochs=0, polish_rounds=0).fit(train, heldout, seed=0)
    quantizer = load_quantizer(options.kept)
    if not isinstance(quantizer, MVQ):
        raise SystemExit(f"{options.kept} must hold an mvq quantizer, but has {quantizer.kind}")
    return quantizer


@torch.no_grad()
def bench_encode(options: argparse.Namespace) -> None:
    """A line per search and number of threads. The first few frames go through the reference, all of them through the others."""
    train, heldout = read_split(options)
    quantizer = kept_mvq(options, train, heldout)
    rows = quantizer.normalize(heldout[: options.encode_frames])
    few, theirs, iters = rows[: options.reference_frames], theirs_of(quantizer), options.refine_iters
    searches: dict[str, Callable[[Tensor], Tensor]] = {
        "exact": lambda x: quantizer.search(x, iters),
        "best": quantizer.search_best,
        "fast": quantizer.search_fast,
    }

    def plain(x: Tensor) -> Tensor:
        with without_loops():
            return quantizer.search(x, iters)

    indexes = kept_faiss(options)
    works: dict[str, tuple[Callable[[Tensor], object], Tensor]] = {
        "multi_quantization": (lambda x: theirs.encode(x, iters), few),
        **{name: (search, rows) for name, search in searches.items()},
        "exact, plain torch": (plain, few),
        **{name: ((lambda x, index=index: index.sa_encode(x.numpy())), rows) for name, index in indexes.items()},
    }
    expected = theirs.encode(few, iters, as_bytes=False).long()
    found = {name: search(few) for name, search in {**searches, "exact, plain torch": plain}.items()}
    total = {name: relative_error(quantizer.reconstruct(search(rows)), rows) for name, search in searches.items()}
    total |= {name: relative_error(torch.from_numpy(index.sa_decode(index.sa_encode(rows.numpy()))), rows) for name, index in indexes.items()}
    print(f"encoding, D = {quantizer.dim}, C = {quantizer.num_codebooks}, {iters} refinements, {len(few)} reference frames of {len(rows)}")
    print("| threads | search | CPU us/frame | elapsed us/frame | CPU ratio | elapsed ratio | identical | error of the rest | relative error |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- | --- |")
    for threads in options.threads:
        set_threads(threads)
        times = interleaved(works, options.repeats)
        reference = times["multi_quantization"]
        for name, took in times.items():
            cpu, wall = (statistics.median(a / b for a, b in zip(*pair)) for pair in zip(reference, took))
            line = (
                f"| {threads} | {name} | {1e6 * statistics.median(took.cpu):.1f} | {1e6 * statistics.median(took.wall):.1f} | {cpu:.1f} | {wall:.1f}"
            )
            print(f"{line} | {agreement(quantizer, found.get(name), expected, few)} | {total.get(name, float('nan')):.4f} |", flush=True)


def interleaved(works: dict[str, tuple[Callable[[Tensor], object], Tensor]], repeats: int) -> dict[str, Times]:
    """Times per frame of each piece of work, all in turn, after one call that is not counted."""
    times = {name: Times([], []) for name in works}
    for work, rows in works.values():
        work(rows[:64])
    for _ in range(repeats):
        for name, (work, rows) in works.items():
            cpu, wall = seconds(lambda work=work, rows=rows: work(rows))  # type: ignore[misc]
            times[name].cpu.append(cpu / len(rows))
            times[name].wall.append(wall / len(rows))
    return times


def agreement(quantizer: MVQ, codes: Tensor | None, expected: Tensor, frames: Tensor) -> str:
    """Share of frames with the reference's codes, and the error of the other frames relative to the reference's for them."""
    if codes is None:
        return " | "
    same = (codes == expected).all(dim=1)
    if bool(same.all()):
        return f"{len(same)} of {len(same)} | "
    mine, theirs = (float(errors(quantizer.reconstruct(found), frames)[~same].sum()) for found in (codes, expected))
    return f"{int(same.sum())} of {len(same)} | {mine / theirs:.5f}"


@torch.no_grad()
def bench_memory(options: argparse.Namespace) -> None:
    """Most memory that one call of encode adds to the process; ours makes its tables in the call."""
    train, heldout = read_split(options)
    quantizer = kept_mvq(options, train, heldout)
    rows, theirs = quantizer.normalize(heldout), theirs_of(quantizer)
    quantizer.search(rows[:64], 1)
    for count in options.memory_frames:
        quantizer._tables = None
        ours = added_memory(lambda count=count: quantizer.search(rows[:count], options.refine_iters))  # type: ignore[misc]
        reference = added_memory(lambda count=count: theirs.encode(rows[:count], options.refine_iters))  # type: ignore[misc]
        figures = f"{ours:.0f} and {reference:.0f} MiB, {reference / ours:.1f}"
        print(f"memory added, D = {quantizer.dim}, C = {quantizer.num_codebooks}, {count} frames: {figures}")


def added_memory(work: Callable[[], object]) -> float:
    """MiB by which the resident memory rises at most during a call (Linux)."""
    Path("/proc/self/clear_refs").write_text("5")
    before = resident("VmRSS")
    work()
    return resident("VmHWM") - before


def resident(field: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return float(next(line for line in lines if line.startswith(field)).split()[1]) / 1024


def bench_step(options: argparse.Namespace) -> None:
    """Ratio of the times of one training step in both phases, from the same weights on the same batches, and whether codes agree."""
    frames, _ = read_split(options)
    frames = (frames - frames.mean(dim=0)) / frames.std(dim=0)
    dim, num, batch, early = frames.shape[1], options.num_codebooks, options.batch_frames, options.repeats
    theirs = multi_quantization.QuantizerTrainer(
        dim=dim, bytes_per_frame=num, device=torch.device("cpu"), phase_one_iters=early, phase_two_iters=10**6
    )
    ours = TwoPhaseTrainer(dim, num, phase_one_iters=early, phase_two_iters=10**6, seed=0)
    ours.quantizer.load_state_dict(theirs.quantizer.state_dict())
    ratios, taken, same = ([[], []], [[], []], [[], []])  # type: tuple[list[list[float]], list[list[float]], list[list[float]]]
    for step in range(2 * early + 1):
        rows, phase, iters = frames[step * batch % (len(frames) - batch) :][:batch], 0 if ours.in_phase_one else 1, 1 + step % 2
        with torch.no_grad():
            expected = theirs_of(ours.quantizer).encode(rows, iters, as_bytes=False).long()
            same[phase].append(float((ours.quantizer.search(rows, iters) == expected).all(dim=1).double().mean()))
        multi_quantization.quantization.random.random = lambda iters=iters: 0.0 if iters == 2 else 1.0  # both refine as often
        reference = seconds(lambda rows=rows: theirs.step(rows))[0]  # type: ignore[misc]
        own = seconds(lambda rows=rows, iters=iters: ours.step(rows, iters))[0]  # type: ignore[misc]
        if step:  # at its first step the other trainer also logs losses
            ratios[phase].append(reference / own)
            taken[phase].append(reference)
    for phase in range(2):
        alike, median = min(same[phase]), statistics.median(taken[phase])
        line = f"training step, phase {phase + 1}, D = {dim}, C = {num}: ratio {statistics.median(ratios[phase]):.1f} of {len(ratios[phase])}"
        print(f"{line}, reference {median:.3f} s; frames with the same codes {100 * alike:.2f} % or more")


def bench_fit(options: argparse.Namespace) -> None:
    """A line per fit: CPU seconds, frames searched, and relative error of held-out frames; the reference schedule runs on our search."""
    train, heldout = read_split(options)
    print(f"fits, D = {train.shape[1]}, C = {options.num_codebooks}, {len(train)} frames\n| fit | CPU s | held-out error |\n| --- | --- | --- |")
    quantizer = None
    for epochs in options.epochs:
        given = {} if epochs < 0 else {"epochs": epochs}
        config = MVQConfig(num_codebooks=options.num_codebooks, **given)
        start = time.process_time()
        quantizer = config.fit(train, heldout, seed=options.seed)
        report(f"spear, {config.epochs} epochs", time.process_time() - start, quantizer, heldout)
        if options.keep is not None:
            quantizer.save(options.keep)
    if options.iters:
        config = MVQConfig(num_codebooks=options.num_codebooks, solver="reference", phase_one_iters=options.iters, phase_two_iters=options.iters)
        start = time.process_time()
        slow = config.fit(train, heldout, seed=options.seed)
        report(f"reference schedule, {options.iters} + {options.iters} steps", time.process_time() - start, slow, heldout)
    mean, std = train.mean(dim=0), train.std(dim=0)
    fit_faiss((train - mean) / std, (heldout - mean) / std, options)


def report(name: str, taken: float, quantizer: MVQ, heldout: Tensor) -> None:
    rows = quantizer.normalize(heldout)
    print(f"| {name} | {taken:.1f} | {relative_error(quantizer.reconstruct(quantizer.search(rows, 5)), rows):.4f} |", flush=True)


def fit_faiss(train: Tensor, heldout: Tensor, options: argparse.Namespace) -> None:
    """Lines for faiss: residual, local-search and product quantization at equal bits."""
    if importlib.util.find_spec("faiss") is None or not options.faiss:
        return
    import faiss

    dim, num = train.shape[1], options.num_codebooks
    for name in options.faiss:
        if name == "product" and dim % num:
            continue
        index = getattr(faiss, FAISS[name])(dim, num, BITS)
        if name == "local search" and options.lsq_iters:
            index.lsq.train_iters = options.lsq_iters
        some = train[: options.faiss_frames or len(train)].numpy()
        taken, _ = seconds(lambda index=index, some=some: index.train(some))  # type: ignore[misc]
        found = torch.from_numpy(index.sa_decode(index.sa_encode(heldout.numpy())))
        print(f"| faiss {name}, {len(some)} frames | {taken:.1f} | {relative_error(found, heldout):.4f} |", flush=True)
        if options.keep is not None:
            options.keep.mkdir(parents=True, exist_ok=True)
            faiss.write_index(index, str(options.keep / f"{name.replace(' ', '_')}.faiss"))


def set_threads(number: int) -> None:
    torch.set_num_threads(number)
    if importlib.util.find_spec("faiss") is not None:
        import faiss

        faiss.omp_set_num_threads(number)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["encode", "memory", "step", "fit"])
    parser.add_argument("--dim", type=int, default=256)
    parser.add_argument("--num-codebooks", type=int, default=8)
    parser.add_argument("--num-frames", type=int, default=20000, help="of the synthetic mixture")
    parser.add_argument("--frames", type=Path, help="safetensors file with frames")
    parser.add_argument("--kept", type=Path, help="encode, memory: folder that `fit --keep` wrote")
    parser.add_argument("--keep", type=Path, help="fit: folder for the last of our quantizers and those of faiss")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, nargs="+", default=[1])
    parser.add_argument("--encode-frames", type=int, default=2048)
    parser.add_argument("--reference-frames", type=int, default=200, help="encoded by multi_quantization")
    parser.add_argument("--memory-frames", type=int, nargs="+", default=[300])
    parser.add_argument("--refine-iters", type=int, default=5)
    parser.add_argument("--batch-frames", type=int, default=600)
    parser.add_argument("--iters", type=int, default=0, help="steps per phase of the reference fit; 0: leave it out")
    parser.add_argument("--epochs", type=int, nargs="*", default=[-1], help="of our fits; -1: the default")
    parser.add_argument("--faiss", nargs="*", choices=FAISS, default=list(FAISS), help="kinds of faiss to fit")
    parser.add_argument("--faiss-frames", type=int, default=0, help="frames that faiss is trained on; 0: all")
    parser.add_argument("--lsq-iters", type=int, default=0, help="training iterations of faiss local search; 0: its default")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    set_threads(options.threads[0])
    {"encode": bench_encode, "memory": bench_memory, "step": bench_step, "fit": bench_fit}[options.what](options)


if __name__ == "__main__":
    main()
