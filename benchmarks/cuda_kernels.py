"""Our own CUDA kernels beside what torch alone does, and beside the least that the device needs.

    python benchmarks/cuda_kernels.py

A floor is the larger of the flop at the rate of a large product (of a Gram half of them, as it is symmetric) and the bytes, each read or
written once, at the rate of a copy. Both rates are measured first.
"""

import statistics
from collections.abc import Callable

import torch
from torch import Size, Tensor

from cells import cuda_seconds
from samplewise import products
from samplewise.convolutional import Convolution
from samplewise.outer import gram_norms
from samplewise.rules.normalization import group_norm, layer_norm

# (n, t, o, i): of GPT-2 small with T=256 and T=1024, of a ViT-B, and of a late convolution
GRAMS = [
    *[(32, 256, o, i) for o, i in ((2304, 768), (768, 768), (3072, 768), (768, 3072), (50304, 768))],
    *[(8, 1024, o, i) for o, i in ((768, 768), (3072, 768))],
    *[(64, 197, o, i) for o, i in ((2304, 768), (768, 768), (3072, 768))],
    (256, 64, 128, 1152),
]
# (n, c_out, c_in, side, kernel, stride): of a ResNet-18 of width 64
CONVOLUTIONS = [(256, 64, 64, 32, 3, 1), (256, 128, 64, 32, 3, 2), (256, 128, 128, 16, 3, 1), (256, 64, 3, 32, 3, 1)]
# (n, positions, width), and (n, channels, side)
LAYER_NORMS = [(32, 256, 768), (8, 1024, 768), (64, 197, 768)]
GROUP_NORMS = [(256, 64, 32), (256, 128, 16), (256, 256, 8), (256, 512, 4)]
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
        kept, products._kernels = products._kernels, lambda *_: None
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


def convolution(n: int, o: int, c: int, side: int, kernel: int, stride: int) -> tuple[Callable[[], Tensor], int, int]:
    """The squared norms of weight gradients; their flop and bytes."""
    images, grad = drawn(n, c, side, side), drawn(n, o, side // stride, side // stride)
    settings = Size((o, c, kernel, kernel)), (stride, stride), (kernel // 2, kernel // 2), (1, 1), 1
    return (
        lambda: Convolution(grad, images, *settings).sq_norms(),
        2 * grad.numel() * c * kernel**2,
        grad.nbytes + images.nbytes,
    )


def layer_norm_sums(n: int, t: int, d: int) -> tuple[Callable[[], Tensor], int, int]:
    """The gradients of scale and shift, the scale's returned."""
    grad, x = drawn(n, t, d), drawn(n, t, d)
    _, *statistics = torch.native_layer_norm(x, (d,), None, None, 1e-5)
    return lambda: first_of(layer_norm(grad, None, x, (d,), statistics=statistics)), 0, 2 * x.nbytes


def group_norm_sums(n: int, c: int, side: int) -> tuple[Callable[[], Tensor], int, int]:
    grad, x = drawn(n, c, side, side), drawn(n, c, side, side)
    _, *statistics = torch.native_group_norm(x, None, None, n, c, side * side, 8, 1e-5)
    return lambda: first_of(group_norm(grad, None, x, 8, statistics=statistics)), 0, 2 * x.nbytes


def first_of(made: dict[str, object]) -> Tensor:
    """All factors that a rule made as gradients, and the first of them."""
    first, *_ = [(factor() if callable(factor) else factor).to_dense() for factor in made.values()]
    return first


def main() -> None:
    torch.set_grad_enabled(False)
    if products._kernels(torch.device("cuda"), torch.bfloat16) is None:
        raise SystemExit("cuda_kernels: Triton is not installed, or cannot compile here; it comes with torch for CUDA")
    rate, copied = ceilings()
    print(
        f"torch {torch.__version__}, {torch.cuda.get_device_name()}: {rate / 1e12:.0f} TFLOP/s bfloat16, {copied / 1e12:.1f} TB/s\n"
    )
    print("| | floor, us | torch alone, us | own kernel, us | relative difference |\n|---|---|---|---|---|")
    for n, t, o, i in GRAMS:
        left, right = drawn(n, 1, t, o), drawn(n, 1, t, i)
        floor = n * t * (t + 1) * (o + i) / rate * 1e6
        print(line(f"Gram norms, n={n}, T={t}, {o}x{i}", lambda a=left, b=right: gram_norms(a, b), floor), flush=True)
    for make, cases, name in (
        (convolution, CONVOLUTIONS, "Convolution norms, n={0}, {1} of {2} channels, {3}x{3}, kernel {4}, stride {5}"),
        (layer_norm_sums, LAYER_NORMS, "Layer norm, n={0}, T={1}, {2}"),
        (group_norm_sums, GROUP_NORMS, "Group norm, n={0}, {1} channels, {2}x{2}"),
    ):
        for case in cases:
            run, flop, moved = make(*case)
            print(line(name.format(*case), run, 1e6 * max(flop / rate, moved / copied)), flush=True)
    for n, t, d in LAYER_NORMS:
        x, weights = drawn(n, t, d), torch.rand(n, device="cuda")
        name, floor = f"Samples times weights, n={n}, T={t}, {d}", 2 * x.nbytes / copied * 1e6
        print(line(name, lambda w=weights, x=x: products.scaled(x, w), floor), flush=True)
    for n, p in ROWS:
        rows, weights = drawn(n, p), torch.rand(n, device="cuda")
        name, floor = f"weighted rows, n={n}, {p / 1e6:.1f} M numbers", (rows.nbytes + 2 * p) / copied * 1e6
        print(line(name, lambda w=weights, r=rows: products.weighted_rows(w, r), floor), flush=True)


if __name__ == "__main__":
    main()
