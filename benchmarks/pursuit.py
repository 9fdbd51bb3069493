"""Pursuit encoders against plain loops, side by side: `python -m benchmarks.pursuit`.

The plain loops are what a reader of the papers would write in torch: matching pursuit that multiplies the residual by
the whole dictionary at every step, IHTP that calls `torch.linalg.lstsq` for one sequence after the other. Both sides
get the same activations in the same process and return the same dense latents.

    python -m benchmarks.pursuit                                           # 576 x 4,608 on the CPU
    python -m benchmarks.pursuit --device cuda --d-in 2304 --d-sae 16384 65536
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sae_research.runtime.files import round_significant, write_json
from sae_research.saes.pursuit import matching, thresholding
from sae_research.saes.pursuit.encoders import IHTPSAE, MPSAE, OMPSAE, NonNegativeMPSAE, NonNegativeOMPSAE, TopKRefitSAE

STEPS = 100
"""Matching-pursuit steps of the headline row."""
K = 5
"""IHTP's k in the headline row."""
TRUE_L0 = 20
"""Atoms that a made-up token is the sum of."""
REPEATS = 2
BANDWIDTH_NUMBERS = 64_000_000
"""Numbers in each array of the bandwidth test: far more than caches hold."""


class Shape(NamedTuple):
    d_in: int = 576
    d_sae: int = 4_608
    sequences: int = 64
    """Sequences of 128 tokens for IHTP; matching pursuit runs on an eighth of them, its loop being slow."""
    seq: int = 128


def compare(saes: object, lm: object, model: object, params: object) -> dict[str, tuple[float, float]]:
    """The rows of `measured` on a quarter of the sequences. Nothing is needed of what is given."""
    with torch.no_grad():
        return measured(Shape(sequences=16))


def measured(shape: Shape | None = None, device: str = "cpu") -> dict[str, tuple[float, float]]:
    """{row: (our seconds, the plain loop's seconds)}, each the best of two runs after a warm-up (the loop of
    matching pursuit: one run).

    Counted: everything from activations [batch, seq, d_in] to dense latents [batch, seq, d_sae]. Not counted: building
    the Gram matrix, which happens once per dictionary. `the fits alone` takes IHTP's supports and correlations as given
    on both sides; `four k` encodes k = 1, 2, 5, 10 as one family, the loop one k after the other.
    """
    shape = Shape() if shape is None else shape
    W, b, x = _inputs(shape, device)
    few = x[: max(1, shape.sequences // 8)]
    matched = MPSAE(W, b, STEPS)
    rows = {
        f"matching pursuit, s = {STEPS}": (
            _seconds(lambda: matched.encode(few), device),
            _seconds(lambda: plain_matching(few - b, W, STEPS), device, 1),
        )
    }
    family = [IHTPSAE(W, b, k) for k in (1, 2, K, 10)]
    rows[f"IHTP, k = {K}"] = (
        _seconds(lambda: family[2].encode(x), device),
        _seconds(lambda: plain_ihtp(x - b, W, K), device),
    )
    rows["IHTP, four k"] = (
        _seconds(lambda: list(IHTPSAE.encode_family(family, x, None)), device),
        _seconds(lambda: [plain_ihtp(x - b, W, member.k) for member in family], device),
    )
    supports, products = _chosen(family[2], x - b)
    sequences = list(x - b)
    rows[f"IHTP, k = {K}, the fits alone"] = (
        _seconds(lambda: thresholding._fit_together(family[2].dictionary(), [supports], sequences, products), device),
        _seconds(
            lambda: [
                torch.linalg.lstsq(W[s].T, x_TD.T, driver=_driver(device)).solution.T
                for s, x_TD in zip(supports, sequences, strict=True)
            ],
            device,
        ),
    )
    return rows


def plain_matching(x: Tensor, W: Tensor, s: int) -> Tensor:
    """Matching pursuit as its definition has it, all tokens at once. Latents [batch, seq, d_sae]."""
    residual = x.reshape(-1, x.shape[-1]).clone()
    z = torch.zeros(len(residual), len(W), device=x.device)
    for _ in range(s):
        correlations = residual @ W.T
        atom = correlations.abs().argmax(dim=1)
        value = correlations.gather(1, atom[:, None])
        z.scatter_add_(1, atom[:, None], value)
        residual -= value * W[atom]
    return z.reshape(*x.shape[:-1], len(W))


def plain_ihtp(x: Tensor, W: Tensor, k: int) -> Tensor:
    """IHTP, one sequence after the other. Latents [batch, seq, d_sae]."""
    z = torch.zeros(*x.shape[:-1], len(W), device=x.device)
    for z_TF, x_TD in zip(z, x, strict=True):
        support = (x_TD @ W.T).abs().topk(k, dim=-1).indices.unique()
        z_TF[:, support] = torch.linalg.lstsq(W[support].T, x_TD.T, driver=_driver(x.device.type)).solution.T
    return z


def speeds(shape: Shape | None = None, device: str = "cpu") -> dict[str, float]:
    """Tokens per second of every encoder, from activations to dense latents."""
    shape = Shape() if shape is None else shape
    W, b, x = _inputs(shape, device)
    x = x[: max(1, shape.sequences // 8)]
    encoders = {
        "ihtp, k = 5": IHTPSAE(W, b, 5),
        "ihtp, k = 5, 3 iterations": IHTPSAE(W, b, 5, iterations=3),
        "topk_refit, k = 10": TopKRefitSAE(W, b, 10),
        "topk_refit, k = 50": TopKRefitSAE(W, b, 50),
        "mpsae, s = 10": MPSAE(W, b, 10),
        "mpsae, s = 100": MPSAE(W, b, 100),
        "nn_mpsae, s = 100": NonNegativeMPSAE(W, b, 100),
        "omp, s = 10": OMPSAE(W, b, 10),
        "omp, s = 50": OMPSAE(W, b, 50),
        "nn_omp, s = 10": NonNegativeOMPSAE(W, b, 10),
        "nn_omp, s = 50": NonNegativeOMPSAE(W, b, 50),
    }
    return {name: x[..., 0].numel() / _seconds(lambda sae=sae: sae.encode(x), device, 2) for name, sae in encoders.items()}


def memory_traffic(shape: Shape | None = None, device: str = "cpu") -> dict[str, float]:
    """How near matching pursuit's steps come to the memory's speed, the first product left out.

    A step of a token reads one Gram row; its correlations stay in cache (CPU) or registers (CUDA, up to 16,384 atoms).
    `bandwidth` is the fastest of a copy, a sum and a triad over arrays that no cache holds. A fraction above 1 is
    possible: rows of popular atoms stay in the last-level cache.
    """
    shape = Shape() if shape is None else shape
    W, b, x = _inputs(shape, device)
    x = (x[: max(1, shape.sequences // 8)] - b).reshape(-1, shape.d_in)
    bandwidth = measured_bandwidth(device)
    dictionary = MPSAE(W, b, STEPS).dictionary()
    bytes_per_step = len(dictionary.atoms) * dictionary.atoms.itemsize
    product = _seconds(lambda: dictionary.correlations(x), device)
    rate = len(x) * STEPS / (_seconds(lambda: matching.pursue(x, dictionary, STEPS), device) - product)
    return {
        "bandwidth, GB/s": bandwidth,
        "bytes a step": bytes_per_step,
        "million steps/s": rate / 1e6,
        "GB/s": rate * bytes_per_step / 1e9,
        "fraction of bandwidth": rate * bytes_per_step / 1e9 / bandwidth,
    }


def measured_bandwidth(device: str) -> float:
    """GB/s (1e9 bytes) of the fastest of a copy, a sum and a triad, from arrays far larger than caches."""
    a, b, c = (torch.ones(BANDWIDTH_NUMBERS, device=device) for _ in range(3))
    size = a.numel() * a.element_size()
    return (
        max(
            2 * size / _seconds(lambda: a.copy_(b), device),
            size / _seconds(lambda: b.sum(), device),
            3 * size / _seconds(lambda: torch.add(b, c, alpha=0.5, out=a), device),
        )
        / 1e9
    )


def _inputs(shape: Shape, device: str) -> tuple[Tensor, Tensor, Tensor]:
    """(unit atoms, zero b_dec, activations): sums of some atoms, few of them popular, and noise."""
    g = torch.Generator().manual_seed(0)
    W = torch.nn.functional.normalize(torch.randn(shape.d_sae, shape.d_in, generator=g), dim=1)
    x = 0.05 * torch.randn(shape.sequences * shape.seq, shape.d_in, generator=g)
    popularity = torch.arange(1, shape.d_sae + 1).float().reciprocal()
    for _ in range(TRUE_L0):
        x += torch.rand(len(x), 1, generator=g) * W[torch.multinomial(popularity, len(x), replacement=True, generator=g)]
    return (
        W.to(device),
        torch.zeros(shape.d_in, device=device),
        x.reshape(shape.sequences, shape.seq, shape.d_in).to(device),
    )


def _chosen(sae: IHTPSAE, x: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    products = [sae.dictionary().correlations(x_TD) for x_TD in x]
    return [c.abs().topk(sae.k, dim=-1).indices.unique() for c in products], products


def _driver(device: str) -> str:
    return "gelsy" if device == "cpu" else "gels"


def _seconds(run: Callable[[], Any], device: str, repeats: int = REPEATS) -> float:
    """The best of some runs; one run goes before where there is more than one."""
    best = float("inf")
    for number in range(repeats + (repeats > 1)):
        _wait(device)
        start = time.perf_counter()
        run()
        _wait(device)
        if number or repeats == 1:
            best = min(best, time.perf_counter() - start)
    return best


def _wait(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize()


def main() -> None:
    parser = argparse.ArgumentParser(description="Pursuit encoders against plain loops")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--d-in", type=int, default=Shape().d_in)
    parser.add_argument("--d-sae", type=int, nargs="+", default=[Shape().d_sae])
    parser.add_argument("--json", type=Path, help="also write the figures there (docs/pursuit/speed.json)")
    options = parser.parse_args()
    figures = []
    with torch.no_grad():
        for d_sae in options.d_sae:
            shape = Shape(options.d_in, d_sae)
            print(f"d_in {shape.d_in:,} x d_sae {d_sae:,} on {options.device}", flush=True)
            against = {
                name: {"ours_seconds": ours, "loop_seconds": loop, "ratio": loop / ours}
                for name, (ours, loop) in measured(shape, options.device).items()
            }
            for name, row in against.items():
                print(
                    f"  {name:32} ours {row['ours_seconds']:8.3f} s, loop {row['loop_seconds']:8.3f} s: "
                    f"{row['ratio']:6.1f}x",
                    flush=True,
                )
            memory = _shown("matching pursuit's steps", memory_traffic(shape, options.device))
            figures.append(
                {
                    "device": options.device,
                    "threads": torch.get_num_threads(),
                    "d_in": shape.d_in,
                    "d_sae": d_sae,
                    "against": against,
                    "memory": memory,
                    "tokens_per_second": _shown("tokens per second", speeds(shape, options.device)),
                }
            )
    if options.json:
        write_json(options.json, round_significant(figures, 3))


def _shown(title: str, values: dict[str, float]) -> dict[str, float]:
    print(f"  {title}")
    for name, value in values.items():
        print(f"    {name:34} {value:,.4g}", flush=True)
    return values


if __name__ == "__main__":
    main()
