"""One file per op family; importing the package fills the tables."""

from . import contraction, convolution, embedding, linear, normalization, recurrent, rewriting

__all__ = ["contraction", "convolution", "embedding", "linear", "normalization", "recurrent", "rewriting"]
