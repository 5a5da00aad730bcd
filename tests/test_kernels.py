"""The Triton kernels where there is no GPU: they compile for one, and Triton's interpreter gives the numbers. Skipped without Triton."""

import subprocess
import sys

import pytest
import torch

triton = pytest.importorskip("triton", reason="Triton comes with torch for CUDA")

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from samplewise import kernels  # noqa: E402

ROWS = {"weights": "*fp32", "rows": "*bf16", "out": "*bf16", "n": "i32", "p": "i32"}
GRAMS = {
    **dict.fromkeys(("left", "right"), "*bf16"),
    "parts": "*fp32",
    **dict.fromkeys(("t", "o", "i", "pairs", "left_m", "left_t", "left_o", "right_m", "right_t", "right_i"), "i32"),
}
SUMS = {
    **dict.fromkeys(("grad", "input", "mean", "rstd", "scale", "shift"), "*bf16"),
    **dict.fromkeys(("size", "positions", "blocks", "by_n", "by_k", "by_p", "means", "common"), "i32"),
}


def types_of(name: str, pointers: dict[str, str]) -> dict[str, str]:
    """Of pointers as they are given, of all others whole numbers."""
    return dict.fromkeys(getattr(kernels, name).arg_names, "i32") | pointers


PATCHES = types_of("_patch_products", {**dict.fromkeys(("grad", "image", "out"), "*bf16"), "parts": "*fp32"})
SCALED = types_of("_scaled", {"weights": "*fp32", **dict.fromkeys(("rows", "out"), "*bf16")})
# Triton takes an argument that is 1 for a constant, and one beyond 32 bits for another type.
VARIANTS = [
    ("_weighted_rows", ROWS, {"block": 1024}),
    ("_weighted_rows", {**ROWS, "p": "i64"}, {"block": 1024}),
    ("_weighted_rows", ROWS, {"n": 1, "p": 1, "block": 1024}),
    ("_gram_norms", GRAMS, {"block": 128, "step": 64}),
    ("_gram_norms", GRAMS, {"left_o": 1, "right_i": 1, "block": 128, "step": 64}),
    ("_gram_norms", GRAMS, {"left_o": 1, "right_i": 1, "pairs": 1, "block": 16, "step": 64}),
    ("_gram_norms", {**GRAMS, "left_m": "i64"}, {"t": 1, "o": 1, "i": 1, "block": 16, "step": 64}),
    ("_patch_products", PATCHES, {"size": 64, "block_p": 64, "deep": True, "written": False}),
    ("_patch_products", PATCHES, {"depth": 1, "stride_w": 1, "size": 128, "block_p": 32, "deep": False, "written": True}),
    ("_norm_sums", SUMS, {"by_p": 1, "by_position": False, "block_k": 32, "block_p": 128}),
    ("_norm_sums", {**SUMS, "mean": "*fp32", "rstd": "*fp32"}, {"by_k": 1, "by_position": True, "block_k": 32, "block_p": 128}),
    ("_scaled", SCALED, {"block": 4096}),
]


# For B200 ptxas runs out of registers with the largest block of a Gram; where that is tried and fails, torch serves.
CASES = [(*v, a) for a in (80, 86, 90, 100, 120) for v in VARIANTS if a != 100 or v[2].get("block") != 128]


@pytest.mark.parametrize(("name", "types", "constants", "architecture"), CASES)
def test_they_compile(name: str, types: dict[str, str], constants: dict[str, int], architecture: int) -> None:
    function = getattr(kernels, name)
    signature = {**types, **dict.fromkeys(constants, "constexpr")}
    places = {(function.arg_names.index(name),): value for name, value in constants.items()}
    source = ASTSource(fn=function, signature=signature, constexprs=places)
    assert triton.compile(source, target=GPUTarget("cuda", architecture, 32)).asm["ptx"]


def test_what_they_take() -> None:
    """Also of an expanded tensor, which is read from a copy."""
    half = torch.empty(1, 1, dtype=torch.float16)
    assert kernels.takes(half.expand(1, 2**31 - 1))
    assert not kernels.takes(half.expand(1, 2**31))
    assert not kernels.takes(torch.empty_strided((1, 2), (1, 2**31), dtype=torch.float16, device="meta"))


NUMBERS = """
import contextlib, torch
from torch.nn import functional as F
from samplewise import kernels
torch.cuda.device = lambda _: contextlib.nullcontext()

def near(found, wanted, most):
    assert ((found.double() - wanted).norm() <= most * wanted.norm()), (found, wanted)

for m, t, o, i in [(3, 37, 20, 50), (2, 1, 5, 7), (2, 130, 9, 70), (1, 300, 64, 3), (2, 3, 1, 1)]:
    left, right = torch.randn(m, t, o).half(), torch.randn(m, t, i).half()
    wanted = torch.einsum("mto,mti->moi", left.double(), right.double()).square().sum((1, 2))
    near(kernels.gram_norms(left, right), wanted, 1e-5)
    near(kernels.gram_norms(left.mT.contiguous().mT, right.transpose(0, 1).contiguous().transpose(0, 1)), wanted, 1e-5)
for n, p in [(1, 1), (3, 1), (5, 1024), (16, 3000)]:
    weights, rows = torch.rand(2 * n)[::2], torch.randn(n, p).half()
    near(kernels.weighted_rows(weights, rows), weights.double() @ rows.double(), 1e-3)
for n, p in [(1, 1), (3, 5000), (2, 4096)]:
    weights, rows = torch.rand(2 * n)[::2], torch.randn(n, p).half()
    near(kernels.scaled(weights, rows), weights.double()[:, None] * rows.double(), 1e-3)
for c, o, size, kernel, stride, padding, dilation in [
    (5, 7, (9, 8), (3, 3), (1, 1), (1, 1), (1, 1)),
    (16, 70, (10, 11), (3, 2), (2, 1), (0, 1), (1, 2)),
    (4, 70, (50,), (5,), (2,), (2,), (1,)),
    (3, 4, (5, 6, 4), (2, 3, 2), (1, 2, 1), (1, 0, 1), (1, 1, 2)),
    (64, 64, (8, 8), (1, 1), (2, 2), (0, 0), (1, 1)),
    # several blocks both ways, of both sizes
    (33, 130, (4, 5), (3, 3), (1, 1), (1, 1), (1, 1)),
    (20, 60, (5, 4), (3, 3), (1, 2), (1, 1), (1, 1)),
    # taps that see nothing but the zeros around
    (2, 3, (3, 2), (2, 1), (7, 1), (3, 2), (3, 1)),
]:
    convolution = (F.conv1d, F.conv2d, F.conv3d)[len(size) - 1]
    x, weight = torch.randn(2, c, *size).half(), torch.randn(o, c, *kernel).double().requires_grad_()
    y = convolution(x.double(), weight, None, stride, padding, dilation)
    grad = torch.randn_like(y).half()
    wanted = torch.stack([torch.autograd.grad(y[i], weight, grad[i].double(), retain_graph=True)[0] for i in range(2)])
    out = torch.full((2, *weight.shape), float("nan")).half()
    squares = kernels.patch_products(grad, x, weight.shape, stride, padding, dilation, out)
    near(out, wanted, 2e-3)
    near(squares, wanted.flatten(1).square().sum(1), 1e-5)
    near(kernels.patch_products(grad, x, weight.shape, stride, padding, dilation), wanted.flatten(1).square().sum(1), 1e-5)
for n, t, d in [(3, 5, 7), (2, 200, 70), (1, 1, 1), (2, 3, 768)]:
    grad, x = torch.randn(2, n, t, d).half()
    mean, rstd = torch.randn(n, t, 1), torch.rand(n, t, 1)
    scale, shift = kernels.norm_sums(grad.mT, x.mT, mean, rstd, by_position=True)
    near(scale, (grad.double() * (x.double() - mean) * rstd).sum(1), 2e-3)
    near(shift, grad.double().sum(1), 2e-3)
    # of samples that were along the second axis
    moved = [y.transpose(0, 1).contiguous().transpose(0, 1) for y in (mean, rstd)]
    assert torch.equal(scale, kernels.norm_sums(grad.mT, x.mT, *moved, by_position=True)[0])
for n, c, groups, p in [(3, 6, 2, 5), (2, 70, 7, 1300), (1, 4, 4, 1), (2, 64, 8, 16)]:
    grad, x = torch.randn(2, n, c, p).half()
    mean, rstd = torch.randn(n, groups).half(), torch.rand(n, groups).half()
    scale, shift = kernels.norm_sums(grad, x, mean, rstd, by_position=False)
    of_channel = [y.double().repeat_interleave(c // groups, 1)[..., None] for y in (mean, rstd)]
    near(scale, (grad.double() * (x.double() - of_channel[0]) * of_channel[1]).sum(2), 2e-3)
    near(shift, grad.double().sum(2), 2e-3)
"""


def test_the_interpreter_gives_the_numbers() -> None:
    done = subprocess.run(
        [sys.executable, "-c", NUMBERS],
        check=False,
        env={"TRITON_INTERPRET": "1", "PYTHONPATH": ":".join(sys.path)},
        capture_output=True,
        text=True,
    )
    if "only 0-dimensional arrays" in done.stderr:
        pytest.skip("this Triton's interpreter does not know this numpy")
    assert not done.returncode, done.stderr
