"""fastloss: cross-entropy and accuracy in one pass over the logits, and SGD in one launch.

>>> import torch
>>> from fastloss import cross_entropy, accuracy
>>> logits = torch.tensor([[2.0, 0.5, -1.0], [0.1, 0.2, 0.3]], requires_grad=True)
>>> target = torch.tensor([0, 1])
>>> loss = cross_entropy(logits, target)
>>> loss.backward()
>>> accuracy(logits, target)
tensor(0.5000)
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

_PACKAGE = Path(__file__).resolve().parent
_ROOT = _PACKAGE.parent
# A wheel holds the kernels inside this package. In the repository they stand beside it, in kernels/; and Python that
# is started in a clone's root finds this folder, without them, before an installed package: the root joins the path.
if (
    not (_PACKAGE / "kernels").is_dir()
    and (_ROOT / "kernels" / "__init__.py").is_file()
    and (_ROOT / "pyproject.toml").is_file()
    and str(_ROOT) not in __path__
):
    __path__.append(str(_ROOT))

from .backends.choice import use_backend  # noqa: E402
from .faces.lazy.heads import WithoutLogits, without_logits  # noqa: E402
from .faces.modules import CrossEntropyLoss, LinearCrossEntropyLoss  # noqa: E402
from .faces.patch import Patch, patch_torch  # noqa: E402
from .linear.functional import linear_cross_entropy, linear_cross_entropy_with_accuracy  # noqa: E402
from .linear.kl_div import linear_kl_div  # noqa: E402
from .linear.statistics import linear_cross_entropy_with_statistics  # noqa: E402
from .linear.token_loss import TokenLoss, linear_token_loss  # noqa: E402
from .linear.topk import TopKLogProbs, linear_topk_log_probs  # noqa: E402
from .loss.functional import LossAndAccuracy, accuracy, cross_entropy, cross_entropy_with_accuracy  # noqa: E402
from .loss.statistics import LossStatistics, cross_entropy_with_statistics  # noqa: E402
from .optim import SGD  # noqa: E402

if TYPE_CHECKING:
    from .metrics.accuracy import Accuracy

__version__ = "0.1.0"

__all__ = [
    "SGD",
    "Accuracy",
    "CrossEntropyLoss",
    "LinearCrossEntropyLoss",
    "LossAndAccuracy",
    "LossStatistics",
    "Patch",
    "TokenLoss",
    "TopKLogProbs",
    "WithoutLogits",
    "accuracy",
    "cross_entropy",
    "cross_entropy_with_accuracy",
    "cross_entropy_with_statistics",
    "linear_cross_entropy",
    "linear_cross_entropy_with_accuracy",
    "linear_cross_entropy_with_statistics",
    "linear_kl_div",
    "linear_token_loss",
    "linear_topk_log_probs",
    "patch_torch",
    "use_backend",
    "without_logits",
]


def __getattr__(name: str) -> Any:
    """``Accuracy`` is a metric of torchmetrics, if that is installed: it is imported when it is asked for."""
    if name == "Accuracy":
        from .metrics.accuracy import Accuracy

        return Accuracy
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
