"""Stream an hour of log-mels through a causal Zipformer: speed, delay, memory, and the distance from the chunk-masked pass.

python tools/bench_streaming.py --size base --chunk 16 --hours 0.1
"""

from __future__ import annotations

import argparse
import gc
import statistics
import time
from pathlib import Path

import torch
from torch import Tensor

from spear.models.zipformer import ZipformerConfig, ZipformerEncoder
from spear.models.zipformer.streaming import EXTRA_FRAMES, ZipformerStream

SIZES = {"base": {}, "5m": {"num_encoder_layers": 1, "encoder_dim": 144, "encoder_unmasked_dim": 144, "feedforward_dim": 432, "num_heads": 4}}
SILENCE = -23.0


def resident_mib() -> float:
    """Memory of this process (Linux)."""
    gc.collect()
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("VmRSS")).split()[1]) / 1024


def noise(frames: int, seed: int) -> Tensor:
    """Like log-mels, (1, frames, 128)."""
    return torch.randn(1, frames, 128, generator=torch.Generator().manual_seed(seed)) * 3 - 6


def difference(encoder: ZipformerEncoder, stream: ZipformerStream, frames: int = 1000) -> float:
    """Largest distance between streaming and one chunk-masked pass over ten seconds."""
    features = noise(frames, 1)
    with torch.no_grad():
        whole = encoder(features, torch.tensor([frames])).features
    padded = torch.cat([features, torch.full((1, stream.step_frames, 128), SILENCE)], dim=1)
    state, pieces = stream.start(), []
    for start in range(0, frames, stream.hop_frames):
        out = stream.step(padded[:, start : start + stream.step_frames], torch.tensor([max(0, min(stream.step_frames, frames - start))]), state)
        pieces.append(out.features[:, : int(out.lens[0])])
        state = out.state
    streamed = torch.cat(pieces, dim=1)
    # the last chunk is shorter in the stream, which waits for frames that never come
    count = min(streamed.shape[1], whole.shape[1]) // stream.chunk * stream.chunk - stream.chunk
    return float((streamed[:, :count] - whole[:, :count]).abs().max())


def main() -> None:
    """Print the figures."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--size", choices=sorted(SIZES), default="5m")
    parser.add_argument("--chunk", type=int, default=16, help="frames at 50 Hz")
    parser.add_argument("--left", type=int, default=128, help="frames at 50 Hz")
    parser.add_argument("--hours", type=float, default=1.0)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    encoder = ZipformerConfig(**SIZES[args.size], causal=True, chunk_size=args.chunk, left_context_frames=args.left).build().eval()
    stream = ZipformerStream(encoder)
    print(f"{args.size}, chunks of {args.chunk} frames, {args.left} frames of left context, {args.threads} thread(s)")
    print(f"  differs from the chunk-masked pass by at most {difference(encoder, stream):.1e}")
    state, lens, times, memory = stream.start(), torch.tensor([stream.step_frames]), [], []
    steps = int(args.hours * 3600 * 100 / stream.hop_frames)
    for step in range(steps):
        features = noise(stream.step_frames, step)
        start = time.perf_counter()
        state = stream.step(features, lens, state).state
        times.append(time.perf_counter() - start)
        if step == steps // 10 or step == steps - 1:
            memory.append(resident_mib())
    chunk_s = stream.hop_frames / 100
    worst = sorted(times)[int(0.99 * len(times))]
    print(f"  {args.hours:g} h: memory {memory[0]:.1f} MiB after a tenth, {memory[1]:.1f} MiB at the end")
    print(f"  a step takes {1e3 * statistics.median(times):.1f} ms (99 %: {1e3 * worst:.1f} ms) for {1e3 * chunk_s:.0f} ms of audio")
    ahead = (EXTRA_FRAMES + 1.5) / 100
    print(f"  delay: chunk {1e3 * chunk_s:.0f} ms + look-ahead {1e3 * ahead:.0f} ms + step {1e3 * statistics.median(times):.1f} ms")


if __name__ == "__main__":
    main()
