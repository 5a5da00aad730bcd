"""Random projections of gradients, the same whatever the device, the shard or the order of parameters."""

import hashlib
from dataclasses import dataclass

import torch
from torch import Size, Tensor


@dataclass(frozen=True)
class GaussianProjection:
    """Independent normal entries of variance 1/size, so that squared norms are kept in expectation (Johnson-Lindenstrauss).

    Args:
        size: Number of components k.
        seed: Drawn together with the parameter's name: a parameter's matrix depends on nothing else.

    Raises:
        ValueError: If `size` is not positive.

    Example:
        >>> GaussianProjection(8, seed=1).matrix("weight", torch.Size([3, 2])).shape
        torch.Size([8, 3, 2])
    """

    size: int
    seed: int = 0

    def __post_init__(self) -> None:
        if self.size < 1:
            raise ValueError(f"GaussianProjection: size, the number of components, must be positive, got {self.size}")

    def matrix(self, name: str, shape: Size) -> Tensor:
        """The matrix for one parameter, `(k, *shape)`, float32, drawn on the CPU."""
        digest = hashlib.sha256(f"gaussian/1/{self.seed}/{name}".encode()).digest()
        generator = torch.Generator("cpu").manual_seed(int.from_bytes(digest[:7], "big"))
        entries: Tensor = torch.randn(self.size, *shape, generator=generator, device="cpu")
        return entries.div(self.size**0.5)
