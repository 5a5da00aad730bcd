"""Our own CUDA kernels beside what torch alone does, and beside the least that the device needs.

    python benchmarks/cuda_kernels.py

The floor of a Gram is its flop (half of it, as it is symmetric) at the rate of a large product; that of weighted rows is their bytes at the
rate of a copy. Both are measured first.
"""

import statistics
from collections.abc import Callable

import torch
from torch import Tensor

from cells import cuda_seconds
from samplewise import products
from samplewise.outer import gram_norms

# (n, t, o, i): of GPT-2 small with T=256 and T=1024, of a ViT-B, and of a late convolution
GRAMS = [
    *[(32, 256, o, i) for o, i in ((2304, 768), (768, 768), (3072, 768), (768, 3072), (50304, 768))],
    *[(8, 1024, o, i) for o, i in ((768, 768), (3072, 768))],
    *[(64, 197, o, i) for o, i in ((2304, 768), (768, 768), (3072, 768))],
    (256, 64, 128, 1152),
]
# n rows of p numbers
ROWS = [(8, 768 * 768), (8, 3072 * 768), (8, 50304 * 768), (16, 3072 * 768), (32, 3072 * 768)]


def microseconds(run: Callable[[], object], calls: int = 10, repeats: int = 7) -> float:
    """Of one of several calls in a row, median of several times; the device waits until the host has launched them."""
    run()
    return 1e6 * statistics.median(cuda_seconds(run, calls, asleep=4_000_000) for _ in range(repeats))


def drawn(*shape: int) -> Tensor:
    return torch.randn(shape, device="cuda", dtype=torch.bfloat16)


def ceilings() -> tuple[float, float]:
    """Flop/s of a large product, bytes/s of a copy."""
    a, x = drawn(8192, 8192), drawn(2**29)
    y = torch.empty_like(x)
    return 2 * 8192**3 / microseconds(lambda: a @ a) * 1e6, 2 * x.nbytes / microseconds(lambda: y.copy_(x)) * 1e6


def with_torch_alone(run: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """The same call without our kernels."""

    def alone() -> Tensor:
        kept, products._kernels = products._kernels, lambda: None
        try:
            return run()
        finally:
            products._kernels = kept

    return alone


def line(name: str, run: Callable[[], Tensor], floor: float) -> str:
    alone = with_torch_alone(run)
    mine, theirs = run().double(), alone().double()
    difference = ((mine - theirs).norm() / theirs.norm()).item()
    times = microseconds(alone), microseconds(run)
    return f"| {name} | {floor:.0f} | {times[0]:.0f} | {times[1]:.0f} | {difference:.0e} |"


def main() -> None:
    torch.set_grad_enabled(False)
    if products._kernels() is None:
        raise SystemExit("cuda_kernels: Triton is not installed; it comes with torch for CUDA")
    rate, copied = ceilings()
    print(
        f"torch {torch.__version__}, {torch.cuda.get_device_name()}: {rate / 1e12:.0f} TFLOP/s bfloat16, {copied / 1e12:.1f} TB/s\n"
    )
    print("| | floor, us | torch alone, us | own kernel, us | relative difference |\n|---|---|---|---|---|")
    for n, t, o, i in GRAMS:
        left, right = drawn(n, 1, t, o), drawn(n, 1, t, i)
        floor = n * t * (t + 1) * (o + i) / rate * 1e6
        print(line(f"Gram norms, n={n}, T={t}, {o}x{i}", lambda a=left, b=right: gram_norms(a, b), floor), flush=True)
    for n, p in ROWS:
        rows, weights = drawn(n, p), torch.rand(n, device="cuda")
        name, floor = f"weighted rows, n={n}, {p / 1e6:.1f} M numbers", (rows.nbytes + 2 * p) / copied * 1e6
        print(line(name, lambda w=weights, r=rows: products.weighted_rows(w, r), floor), flush=True)


if __name__ == "__main__":
    main()
