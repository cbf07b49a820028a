"""The Triton kernels and the functions that launch them: what ``fastloss.backends.eager`` offers, for GPU tensors.

One file an op. ``arguments`` has the tuples that kernels take, ``tile_helpers`` the parts that they share, ``tiles``
the choice of tiles and grids, ``launch`` the start of a kernel.
"""

from .accuracy import accuracy, label_ranks
from .cross_entropy import cross_entropy_backward, cross_entropy_forward
from .kl_div import kl_div
from .rescale import rescale
from .sgd import sgd_squares, sgd_step
from .soft_cross_entropy import soft_cross_entropy_backward, soft_cross_entropy_forward
from .soft_statistics import soft_statistics_backward, soft_statistics_forward
from .statistics import (
    row_statistics_backward,
    row_statistics_forward,
    statistics_backward,
    statistics_forward,
)

__all__ = [
    "accuracy",
    "cross_entropy_backward",
    "cross_entropy_forward",
    "kl_div",
    "label_ranks",
    "rescale",
    "row_statistics_backward",
    "row_statistics_forward",
    "sgd_squares",
    "sgd_step",
    "soft_cross_entropy_backward",
    "soft_cross_entropy_forward",
    "soft_statistics_backward",
    "soft_statistics_forward",
    "statistics_backward",
    "statistics_forward",
]
