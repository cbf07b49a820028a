"""The fallback in plain torch ops: the functions of ``fastloss.kernels``, for tensors that Triton does not serve."""

from .accuracy import accuracy, label_ranks
from .cross_entropy import cross_entropy_backward, cross_entropy_forward, rescale
from .kl_div import kl_div
from .sgd import sgd_squares, sgd_step
from .soft_cross_entropy import soft_cross_entropy_backward, soft_cross_entropy_forward
from .soft_statistics import soft_statistics_backward, soft_statistics_forward
from .statistics import (
    row_statistics_backward,
    row_statistics_forward,
    statistics_backward,
    statistics_forward,
)
