"""The fallback in plain torch ops: what ``fastloss.kernels`` offers, for tensors that Triton does not serve."""

from .accuracy import accuracy
from .cross_entropy import cross_entropy_backward, cross_entropy_forward, rescale

__all__ = ["accuracy", "cross_entropy_backward", "cross_entropy_forward", "rescale"]
