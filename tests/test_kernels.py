"""The Triton kernels where there is no GPU: they compile for one, and Triton's interpreter gives the numbers. Skipped without Triton."""

import subprocess
import sys

import pytest

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
# Triton takes an argument that is 1 for a constant, and one beyond 32 bits for another type.
VARIANTS = [
    ("_weighted_rows", ROWS, {"block": 1024}),
    ("_weighted_rows", {**ROWS, "p": "i64"}, {"block": 1024}),
    ("_weighted_rows", ROWS, {"n": 1, "p": 1, "block": 1024}),
    ("_gram_norms", GRAMS, {"block": 128, "step": 64}),
    ("_gram_norms", GRAMS, {"left_o": 1, "right_i": 1, "pairs": 1, "block": 16, "step": 64}),
    ("_gram_norms", {**GRAMS, "left_m": "i64"}, {"t": 1, "o": 1, "i": 1, "block": 16, "step": 64}),
]


@pytest.mark.parametrize(("name", "types", "constants"), VARIANTS)
def test_they_compile(name: str, types: dict[str, str], constants: dict[str, int]) -> None:
    function = getattr(kernels, name)
    signature = {**types, **dict.fromkeys(constants, "constexpr")}
    places = {(function.arg_names.index(name),): value for name, value in constants.items()}
    source = ASTSource(fn=function, signature=signature, constexprs=places)
    assert triton.compile(source, target=GPUTarget("cuda", 90, 32)).asm["ptx"]


NUMBERS = """
import contextlib, torch
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
