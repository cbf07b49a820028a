"""A process of several that share rows or classes: ``python ranks.py RANK RANKS FOLDER``.

Each writes to FOLDER what it was given for its part; ``test_parallel.py`` puts the parts together and holds them
against one process in float64.
"""

from __future__ import annotations

import functools
import os
import sys
import zlib
from dataclasses import dataclass, field, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

LIMIT = 300  # seconds, many for a busy machine, after which a process that waits for another gives up


@dataclass(frozen=True)
class Case:
    """One loss over several ranks, whose tensors follow from its name."""

    name: str
    shape: tuple[int, ...] = (7, 13)
    target: str = "labels"  # or "soft"
    dtype: torch.dtype = torch.float64
    weighted: bool = False
    ignored: str = ""  # "some" rows or "all"
    options: dict[str, Any] = field(default_factory=dict)
    topk: tuple[int, ...] = ()
    sizes: dict[int, tuple[int, ...]] = field(default_factory=dict)  # shards of the classes, by the number of ranks
    placements: str = (
        ""  # of a DTensor: a letter a dimension of the mesh, r, s (rows), t (trailing rows) or c (classes)
    )
    mesh: dict[int, tuple[int, ...]] = field(default_factory=dict)
    backend: str = "eager"
    second: bool = False  # the second derivative too
    special: str = ""  # logits that are not finite, or tied

    def tensors(self) -> tuple[Tensor, Tensor, Tensor | None, Tensor, Tensor]:
        """Logits, target, class weights, upstream gradient of the loss, and one of the gradient."""
        generator = torch.Generator().manual_seed(zlib.crc32(self.name.encode()))

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        x = normal(*self.shape) * 2
        dim = min(1, x.dim() - 1)
        if self.special == "tied" or self.topk:
            x = x.round() / 2
        if self.special == "infinite":
            x[0, 1:5] = -torch.inf
            x[1, :-1] = -torch.inf  # whole shards
        if self.special == "nan":
            x[0, 3], x[1, 2], x[1, 5] = (torch.nan,) * 3
        rows = self.shape[:dim] + self.shape[dim + 1 :]
        if self.target == "soft":
            t = torch.softmax(normal(*self.shape), dim)
        else:
            count = torch.Size(rows).numel()
            # Every class is some row's label in turn, so that each rank has labels.
            t = (torch.arange(count) * 5 % self.shape[dim]).view(rows)
            if self.special == "infinite":
                t[0], t[1] = self.shape[1] - 2, self.shape[1] - 1
            if self.special == "nan":
                t[0], t[1] = 3, 5
            ignore = self.options.get("ignore_index", -100)
            if self.ignored == "some":
                t.view(-1)[::3] = ignore
            elif self.ignored == "first half":  # all of a rank's
                t.view(-1)[: count // 2] = ignore
            elif self.ignored == "all":
                t.fill_(ignore)
        weight = (
            torch.rand(self.shape[dim], generator=generator, dtype=torch.float64) + 0.5 if self.weighted else None
        )
        upstream = normal(*rows) if self.options.get("reduction") == "none" else normal(1)[0]
        v = normal(*self.shape)
        x, v = x.to(self.dtype), v.to(self.dtype)
        t = t.to(self.dtype) if self.target == "soft" else t
        return x, t, None if weight is None else weight.to(self.dtype), upstream, v

    def class_dim(self) -> int:
        return min(1, len(self.shape) - 1)

    def shards(self, ranks: int) -> list[int]:
        """How many classes each rank has."""
        if ranks in self.sizes:
            return list(self.sizes[ranks])
        classes = self.shape[self.class_dim()]
        size = -(-classes // ranks)
        return [max(0, min(size, classes - size * rank)) for rank in range(ranks)]


@dataclass(frozen=True)
class Linear(Case):
    """The same of ``linear_cross_entropy``: the logits are of 5 features."""

    shape: tuple[int, ...] = (9, 13)  # (…, C)
    how: dict[str, Any] = field(default_factory=lambda: {"chunk_size": 2})
    bias: bool = True
    of: str = "loss"  # or "statistics", or "tokens": a loss of tokens

    def class_dim(self) -> int:
        return len(self.shape) - 1

    def map(self) -> tuple[Tensor, Tensor, Tensor]:
        """Hidden states, W and b."""
        generator = torch.Generator().manual_seed(zlib.crc32(self.name.encode()) + 1)
        shapes = (*self.shape[:-1], 5), (self.shape[-1], 5), self.shape[-1:]
        x, w, b = (torch.randn(shape, generator=generator, dtype=torch.float64).to(self.dtype) for shape in shapes)
        return x, w, b

    def of_rows(self) -> tuple[Tensor, Tensor]:
        """Two classes of each row, and a number."""
        generator = torch.Generator().manual_seed(zlib.crc32(self.name.encode()) + 2)
        ids = torch.randint(self.shape[-1], (*self.shape[:-1], 2), generator=generator)
        return ids, torch.randn(self.shape[:-1], generator=generator, dtype=torch.float64)

    def tensors(self) -> tuple[Tensor, Tensor, Tensor | None, Tensor, Tensor]:
        flat = Case(**{f: getattr(self, f) for f in Case.__dataclass_fields__} | {"shape": (-1, self.shape[-1])})
        rows = torch.Size(self.shape[:-1]).numel()
        _, t, weight, upstream, v = Case.tensors(replace(flat, shape=(rows, self.shape[-1])))
        lead = self.shape[:-1]
        t = t.view(*lead, *t.shape[1:])
        return torch.empty(0), t, weight, upstream.view(lead) if upstream.dim() else upstream, v


def combined(parts: Any) -> Any:
    """All parts of a row's statistics in one number."""
    rows = 0.3 * parts.lse + 0.5 * parts.entropy + 0.2 * parts.selected.sum(-1)
    rows = rows + 0.4 * parts.log_sum_sq_probs - 0.6 * parts.mean_logit
    rows = rows + parts.predicted.double() / 16 + parts.correct.double()
    whole = parts.loss + 0.7 * parts.z_loss
    return whole + (rows if whole.dim() else rows.sum())


def of_token(log_probs: Tensor, entropy: Tensor, number: Tensor) -> Tensor:
    """A loss that is not linear in either."""
    return -torch.minimum(log_probs.exp() * number, 0.1 * number) - 0.3 * entropy * entropy


EVERYTHING = {"label_smoothing": 0.2, "lse_square_scale": 0.1, "softcap": 3.0, "temperature": 0.7, "logit_scale": 2.0}
UNEVEN = {2: (4, 9), 4: (2, 6, 1, 4)}
EMPTY = {2: (13, 0), 4: (0, 5, 8, 0)}
PARTS = ("z_loss", "lse", "entropy", "predicted", "correct", "log_sum_sq_probs", "mean_logit")
GROUPS = [
    Case("plain"),
    Case("uneven", sizes=UNEVEN, ignored="some"),
    Case("empty shards", sizes=EMPTY, options=EVERYTHING),
    Case("sum", options={"reduction": "sum"}, weighted=True, ignored="some", sizes=UNEVEN),
    Case("none", options={"reduction": "none", **EVERYTHING}, weighted=True, ignored="some", sizes=UNEVEN),
    Case("smoothing", options={"label_smoothing": 0.3}, sizes=UNEVEN),
    Case("smoothing, weights", options={"label_smoothing": 0.3}, weighted=True, ignored="some", sizes=UNEVEN),
    Case("z-loss", options={"lse_square_scale": 0.2}, weighted=True, sizes=UNEVEN),
    Case("softcap", options={"softcap": 2.0}, sizes=UNEVEN),
    Case("scaled", options={"logit_scale": torch.tensor(0.6), "temperature": 0.8}, sizes=UNEVEN, topk=(1,)),
    Case("everything", options=EVERYTHING, weighted=True, ignored="some", sizes=UNEVEN),
    Case("ignore_index is a class", options={"ignore_index": 3}, ignored="some", sizes=UNEVEN),
    Case("all ignored", ignored="all"),
    Case("all ignored, sum", ignored="all", options={"reduction": "sum", **EVERYTHING}),
    Case("spatial", shape=(2, 13, 3, 2), options=EVERYTHING, weighted=True, ignored="some", sizes=UNEVEN),
    Case("one row", shape=(13,), options=EVERYTHING, sizes=UNEVEN),
    Case("no rows", shape=(0, 13), options={"reduction": "sum"}),
    Case("infinite", special="infinite", options={"reduction": "none"}),
    Case("nan", special="nan", options={"reduction": "none"}, topk=(1, 2, 5)),
    Case("soft", target="soft", sizes=UNEVEN),
    Case("soft, everything", target="soft", sizes=UNEVEN, options=EVERYTHING, weighted=True),
    Case("soft, none", target="soft", sizes=UNEVEN, options={"reduction": "none", **EVERYTHING}, weighted=True),
    Case("soft, empty shards", target="soft", sizes=EMPTY, options=EVERYTHING, weighted=True),
    Case("soft, spatial", target="soft", shape=(2, 13, 3), options={"label_smoothing": 0.1}, sizes=UNEVEN),
    Case("soft, top", target="soft", sizes=UNEVEN, topk=(1, 3), options=EVERYTHING),
    Case("probabilities", options={"from_logits": False, "label_smoothing": 0.1}, weighted=True, ignored="some"),
    Case("probabilities, soft", target="soft", options={"from_logits": False, "label_smoothing": 0.1}, weighted=True),
    Case("probabilities, soft, sum", target="soft", options={"from_logits": False, "reduction": "sum"}, topk=(2,)),
    Case("top-1", topk=(1,), sizes=UNEVEN, ignored="some", shape=(40, 13)),
    Case("top", topk=(1, 3, 20), sizes=UNEVEN, ignored="some", shape=(40, 13), options=EVERYTHING),
    Case("top, none", topk=(2, 4), options={"reduction": "none"}, ignored="some", shape=(6, 13, 4)),
    Case("top, sum", topk=(2, 4), options={"reduction": "sum"}, sizes=EMPTY),
    Case("float32", dtype=torch.float32, options=EVERYTHING, weighted=True, shape=(7, 501)),
    Case("bfloat16", dtype=torch.bfloat16, shape=(7, 501)),
    Case("soft float32", dtype=torch.float32, target="soft", options=EVERYTHING, weighted=True, shape=(7, 501)),
    Case("kernels", backend="triton", options=EVERYTHING, weighted=True, ignored="some", topk=(1, 3), sizes=UNEVEN),
    Case(
        "kernels, soft", backend="triton", target="soft", options=EVERYTHING, weighted=True, topk=(2,), sizes=UNEVEN
    ),
    Case("kernels, empty", backend="triton", sizes=EMPTY, topk=(2,)),
]
TWO_D = {2: (2, 1), 4: (2, 2)}
PLACED = [
    Case("D replicated", placements="r", options=EVERYTHING, weighted=True, topk=(1,)),
    Case("D rows", placements="s", options=EVERYTHING, weighted=True, ignored="some", topk=(1, 3)),
    Case("D rows, plain", placements="s", ignored="first half", second=True),
    Case("D rows, all ignored", placements="s", ignored="all", topk=(1,)),
    Case("D rows, none", placements="s", options={"reduction": "none"}, topk=(2,), weighted=True),
    Case("D rows, sum", placements="s", options={"reduction": "sum"}, ignored="some"),
    Case("D few rows", placements="s", shape=(1, 13), options={"lse_square_scale": 0.1}, second=True),
    Case("D rows, float16", placements="s", dtype=torch.float16, ignored="some"),
    Case("D rows, soft", placements="s", target="soft", options=EVERYTHING, weighted=True, topk=(1,)),
    Case("D rows, soft, second", placements="s", target="soft", second=True, options={"label_smoothing": 0.1}),
    Case("D trailing rows", placements="t", shape=(2, 13, 5), weighted=True, options={"reduction": "none"}),
    Case("D rows, probabilities", placements="s", options={"from_logits": False}, weighted=True, ignored="some"),
    Case("D classes", placements="c", options=EVERYTHING, weighted=True, ignored="some", topk=(1, 3)),
    Case("D classes, soft", placements="c", target="soft", options=EVERYTHING, weighted=True, topk=(1, 3)),
    Case("D classes, none", placements="c", options={"reduction": "none"}, shape=(3, 13, 4), topk=(2,)),
    Case("D classes, one row", placements="c", shape=(13,)),
    Case("D both", placements="sc", mesh=TWO_D, options=EVERYTHING, weighted=True, ignored="some", topk=(1, 3)),
    Case("D both, half ignored", placements="sc", mesh=TWO_D, ignored="first half"),
    Case("D both, none", placements="sc", mesh=TWO_D, options={"reduction": "none"}, topk=(1,)),
    Case("D both, soft", placements="cs", mesh=TWO_D, target="soft", options=EVERYTHING, topk=(1,)),
    Case("D both rows", placements="st", mesh=TWO_D, shape=(3, 13, 5), ignored="some", topk=(2,)),
    Case("D rows and copies", placements="rs", mesh=TWO_D, weighted=True, topk=(1,)),
    Case("D kernels", placements="sc", mesh=TWO_D, backend="triton", options=EVERYTHING, ignored="some", topk=(1,)),
    Case("D rows, kernels", placements="s", backend="triton", options=EVERYTHING, ignored="some", topk=(1,)),
]


LINEAR = [
    Linear("L plain"),
    Linear("L uneven", sizes=UNEVEN, ignored="some", options=EVERYTHING, weighted=True),
    Linear("L scaled", options={"logit_scale": torch.tensor(0.6), "temperature": 0.8}, ignored="some"),
    Linear("L one chunk", sizes=UNEVEN, how={}, bias=False),
    Linear("L empty shards", sizes=EMPTY, options=EVERYTHING),
    Linear("L none", sizes=UNEVEN, options={"reduction": "none", **EVERYTHING}, weighted=True, ignored="some"),
    Linear("L sum", options={"reduction": "sum"}, topk=(1, 3), ignored="some"),
    Linear("L top", topk=(1, 3), ignored="some", options=EVERYTHING, sizes=UNEVEN),
    Linear("L top, none", topk=(2,), options={"reduction": "none"}, ignored="some"),
    Linear("L all ignored", ignored="all", topk=(1,)),
    Linear("L soft", target="soft", sizes=UNEVEN, options=EVERYTHING, weighted=True, topk=(1,)),
    Linear("L soft, none", target="soft", sizes=UNEVEN, options={"reduction": "none", **EVERYTHING}),
    Linear("L shift", shape=(2, 4, 13), how={"shift": True, "chunk_size": 3}, ignored="some"),
    Linear("L shift, none", shape=(2, 4, 13), how={"shift": 2}, options={"reduction": "none"}),
    Linear("L into", how={"accumulate_grad": True, "chunk_size": 4}, sizes=UNEVEN, options=EVERYTHING, weighted=True),
    # Alone, ranks of fewer classes would have larger chunks, and so fewer collectives.
    Linear("L budget", how={"memory_budget": 1276}, sizes={2: (10, 3), 4: (6, 4, 2, 1)}, topk=(1,)),
    Linear("L float16", dtype=torch.float16, ignored="some"),
    Linear("L bfloat16", dtype=torch.bfloat16, shape=(9, 301)),
    Linear("L kernels", backend="triton", options=EVERYTHING, weighted=True, ignored="some", sizes=UNEVEN, topk=(1,)),
]
NONE = {"reduction": "none"}
LINEAR += [
    Linear("S plain", of="statistics"),
    Linear("S uneven", of="statistics", sizes=UNEVEN, ignored="some", options={**EVERYTHING, **NONE}, weighted=True),
    Linear("S empty shards", of="statistics", sizes=EMPTY, options=EVERYTHING, how={}),
    Linear("S shift", of="statistics", shape=(2, 4, 13), how={"shift": True, "chunk_size": 3}, options=NONE),
    Linear("S kernels", of="statistics", backend="triton", sizes=UNEVEN, options=EVERYTHING, ignored="some"),
    Linear("T plain", of="tokens", ignored="some"),
    Linear("T none", of="tokens", sizes=UNEVEN, options={"softcap": 3.0, **NONE}, ignored="some"),
    Linear("T empty shards", of="tokens", sizes=EMPTY, how={}, options={"reduction": "sum"}),
    Linear("T shift", of="tokens", shape=(2, 4, 13), how={"shift": True, "chunk_size": 3}),
    Linear("T kernels", of="tokens", backend="triton", sizes=UNEVEN, ignored="some"),
]
LINEAR_PLACED = [  # of the input and of the head
    Linear("LD replicated", placements="rr", topk=(1,)),
    Linear("LD classes", placements="rc", options=EVERYTHING, weighted=True, ignored="some", topk=(1, 3)),
    Linear("LD classes, plain input", placements="-c", target="soft"),
    Linear("LD classes, none", placements="rc", options={"reduction": "none"}, topk=(1,)),
    Linear("LD budget", placements="rc", how={"memory_budget": 1096}),
    Linear("LD rows", placements="sr", options=EVERYTHING, weighted=True, ignored="some", topk=(1, 3)),
    Linear("LD rows, half ignored", placements="sr", ignored="first half"),
    Linear("LD rows, none", placements="sr", options={"reduction": "none"}, topk=(2,), ignored="some"),
    Linear("LD rows, soft", placements="sr", target="soft", options=EVERYTHING, weighted=True, topk=(1,)),
    Linear("LD rows, float16", placements="sr", dtype=torch.float16),
    Linear("LD few rows", placements="sr", shape=(1, 13), topk=(1,)),
    Linear("LD sequences", placements="sr", shape=(3, 4, 13), how={"shift": True}, topk=(1,)),
    Linear("LD positions", placements="tr", shape=(3, 4, 13), ignored="some", options={"reduction": "none"}),
    Linear("LD both", placements="srrc", mesh=TWO_D, options=EVERYTHING, ignored="some", topk=(1, 3)),
    Linear("LD both, soft", placements="rscr", mesh=TWO_D, target="soft", options={"reduction": "sum"}),
    Linear("LD both, none", placements="srrc", mesh=TWO_D, shape=(3, 4, 13), options={"reduction": "none"}),
    Linear("LD kernels", placements="srrc", mesh=TWO_D, backend="triton", ignored="some", topk=(1,)),
    Linear("SD classes", of="statistics", placements="rc", options={**EVERYTHING, **NONE}, weighted=True),
    Linear("SD both", of="statistics", placements="srrc", mesh=TWO_D, shape=(3, 4, 13), options=NONE, ignored="some"),
    Linear("TD classes", of="tokens", placements="rc", ignored="some"),
    Linear("TD both", of="tokens", placements="srrc", mesh=TWO_D, shape=(3, 4, 13), ignored="some"),
]


@dataclass(frozen=True)
class Parts(Case):
    """The same of ``cross_entropy_with_statistics``, with every part, and an upstream gradient of each."""

    asked: tuple[str, ...] = PARTS

    def upstreams(self) -> dict[str, Tensor]:
        """Upstream gradients of the differentiable parts."""
        generator = torch.Generator().manual_seed(zlib.crc32(self.name.encode()) + 2)
        dim = self.class_dim()
        rows = self.shape[:dim] + self.shape[dim + 1 :]
        of_losses = rows if self.options.get("reduction") == "none" else ()
        names = [name for name in ("loss", *self.asked) if name not in ("predicted", "correct")]
        return {
            name: torch.randn(of_losses if "loss" in name else rows, generator=generator, dtype=torch.float64)
            for name in names
        }


STATISTICS = [
    Parts("P plain", ignored="some", shape=(40, 13), special="tied"),
    Parts("P everything", options=EVERYTHING, weighted=True, ignored="some", sizes=UNEVEN),
    Parts("P none", options={"reduction": "none", **EVERYTHING}, weighted=True, ignored="some", sizes=UNEVEN),
    Parts("P empty shards", sizes=EMPTY, options={"reduction": "sum", "lse_square_scale": 0.1}),
    Parts("P spatial", shape=(2, 13, 3, 2), options=EVERYTHING, ignored="some", sizes=UNEVEN),
    Parts("P one row", shape=(13,), sizes=UNEVEN),
    Parts("P no rows", shape=(0, 13), options={"reduction": "sum"}),
    Parts("P infinite", special="infinite", options={"reduction": "none"}, sizes=UNEVEN),
    Parts("P nan", special="nan", options={"reduction": "none"}),
    Parts("P soft", target="soft", sizes=UNEVEN, options=EVERYTHING, weighted=True, shape=(30, 13)),
    Parts("P soft, none", target="soft", sizes=EMPTY, options={"reduction": "none", **EVERYTHING}),
    Parts("P float32", dtype=torch.float32, options=EVERYTHING, weighted=True, shape=(7, 501)),
    Parts("P kernels", backend="triton", options=EVERYTHING, weighted=True, ignored="some", sizes=UNEVEN),
    *(Parts(f"P {name}", asked=(name,), options={"lse_square_scale": 0.1}, sizes=UNEVEN) for name in PARTS),
    Parts("PD rows", placements="s", options=EVERYTHING, weighted=True, ignored="some"),
    Parts("PD rows, half ignored", placements="s", ignored="first half"),
    Parts("PD rows, none", placements="s", options={"reduction": "none"}, shape=(3, 13, 4)),
    Parts("PD few rows", placements="s", shape=(1, 13)),
    Parts("PD rows, soft", placements="s", target="soft", options=EVERYTHING, weighted=True),
    Parts("PD rows, bfloat16", placements="s", dtype=torch.bfloat16, shape=(7, 501)),
    Parts("PD classes", placements="c", options=EVERYTHING, weighted=True, ignored="some"),
    Parts("PD classes, soft", placements="c", target="soft", options=EVERYTHING, weighted=True),
    Parts("PD both", placements="sc", mesh=TWO_D, options=EVERYTHING, weighted=True, ignored="some"),
    Parts("PD both, none", placements="sc", mesh=TWO_D, options={"reduction": "none"}),
    Parts("PD kernels", placements="sc", mesh=TWO_D, backend="triton", options=EVERYTHING, ignored="some"),
]


COUNTED = [
    Case("plain"),
    Case("with accuracy", topk=(1, 3), options=EVERYTHING, weighted=True),
    Case("many classes", shape=(7, 1300), topk=(1, 3), options=EVERYTHING, weighted=True),
    Case("soft", target="soft", options=EVERYTHING, weighted=True),
    Case("soft with accuracy", target="soft", topk=(2,)),
    Case("D classes", placements="c", options=EVERYTHING, weighted=True),
    Case("D classes with accuracy", placements="c", topk=(1, 3), options=EVERYTHING, weighted=True),
    Case("D rows", placements="s", topk=(1, 3), options=EVERYTHING),
    Case("D both", placements="sc", mesh=TWO_D, topk=(1,)),
    Parts("statistics", options=EVERYTHING, weighted=True),
    Parts("statistics of soft", target="soft"),
    Parts("lse of soft", target="soft", asked=("lse", "z_loss")),
    Parts("D statistics of classes", placements="c", options=EVERYTHING),
    Parts("D statistics of rows", placements="s"),
    Linear("linear", how={"chunk_size": 3}),
    Linear("linear with accuracy", how={"chunk_size": 3}, topk=(1,)),
]
BLIND = [case for case in (*GROUPS, *LINEAR) if case.name in ("everything", "soft, top", "top", "L top", "L soft")]
BLIND_PARTS = [case for case in STATISTICS if case.name in ("P everything", "P soft, none")]


def grouped_linear(case: Linear, rank: int, ranks: int, group: Any) -> dict[str, Any]:
    """This rank's part of a case of :data:`LINEAR`."""
    _, t, weight, upstream, _ = case.tensors()
    x, w, b = case.map()
    sizes, soft = case.shards(ranks), case.target == "soft"
    x.requires_grad_()
    w, b = (each.split(sizes)[rank].clone().requires_grad_() for each in (w, b))
    target = t.split(sizes, -1)[rank].clone().requires_grad_() if soft else t
    loss, right = _called_linear(case, x, w, target, b, weight, {"group": group}, case.of_rows())
    up = upstream[..., : -case.how["shift"]] if case.how.get("shift") and upstream.dim() else upstream
    loss.backward(up.to(loss.dtype))
    wanted = [x, w] + ([b] if case.bias else []) + ([target] if soft else [])
    return {"loss": loss.detach(), "accuracy": right, "gradients": [each.grad for each in wanted]}


def placed_linear(case: Linear, ranks: int) -> dict[str, Any]:
    """A case of :data:`LINEAR_PLACED`."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    _, t, weight, upstream, _ = case.tensors()
    x, w, b = case.map()
    mesh = init_device_mesh("cpu", case.mesh.get(ranks, (ranks,)))
    of_input, of_head = case.placements[: mesh.ndim], case.placements[mesh.ndim :]
    soft, last = case.target == "soft", x.dim() - 1
    of: dict[str, Any] = {"r": Replicate(), "s": Shard(0), "t": Shard(last - 1), "c": Shard(0), "-": Replicate()}
    head = [of[letter] for letter in of_head]
    if of_input != "-":
        x = distribute_tensor(x, mesh, [of[letter] for letter in of_input])
    x.requires_grad_()
    w, b = (distribute_tensor(each, mesh, head).requires_grad_() for each in (w, b))
    lies = [Shard(last) if h == "c" and soft else of[i] for i, h in zip(of_input, of_head, strict=True)]
    target = distribute_tensor(t, mesh, lies)
    if soft:
        target.requires_grad_()
    of_rows = case.of_rows() if soft else tuple(distribute_tensor(each, mesh, lies) for each in case.of_rows())
    loss, right = _called_linear(case, x, w, target, b, weight, {}, of_rows)
    up = upstream[..., : -case.how["shift"]] if case.how.get("shift") and upstream.dim() else upstream
    loss.backward(distribute_tensor(up.to(loss.dtype), mesh, loss.placements))
    wanted: list[Any] = [x, w] + ([b] if case.bias else []) + ([target] if soft else [])

    def whole(tensor: Any) -> Tensor:
        return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor

    return {
        "loss": whole(loss.detach()),
        "accuracy": tuple(map(whole, right)),
        "kept placements": [getattr(v, "placements", 0) == getattr(v.grad, "placements", 0) for v in wanted],
        "gradients": [whole(each.grad) for each in wanted],
    }


# Of the K best classes: the dtype, K, and the rows beyond those that the ranks tell each other at a time.
BEST = [("float32", 4, 5), ("float64", 1, 3), ("float32", 13, 1030)]


def best_classes(rank: int, ranks: int, group: Any) -> list[Any]:
    """What ``group=``, and each placement of DTensors, gives for each of :data:`BEST`."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    import fastloss

    found, mesh = [], init_device_mesh("cpu", (ranks,))
    for number in range(len(BEST)):
        x, w, b, k = best_problem(number)
        sizes = [13 - (ranks - 1), *[1] * (ranks - 1)]  # ranks with fewer than K classes
        shard = [each.split(sizes)[rank] for each in (w, b)]
        call, how = fastloss.linear_topk_log_probs, {"softcap": 50.0, "chunk_size": 100}
        found.append(call(x, shard[0], k, linear_bias=shard[1], group=group, **how))
        for of_x, of_w in ((None, Shard(0)), (Shard(0), Replicate()), (Replicate(), Shard(0))):
            heads = [distribute_tensor(each, mesh, [of_w]) for each in (w, b)]
            rows = x if of_x is None else distribute_tensor(x, mesh, [of_x])
            result = call(rows, heads[0], k, linear_bias=heads[1], **how)
            found.append([each.full_tensor() for each in result])
    return found


# Of divergences from a teacher: the dtype, the options, and whether rows are ignored.
DIVERGENCES: list[tuple[str, dict[str, Any], bool]] = [
    ("float64", {"beta": 0.0, "chunk_size": 3}, True),
    ("float32", {"beta": 0.3, "temperature": 2.0, "softcap": 3.0, "shift": 1, "chunk_size": 4}, True),
    (
        "float32",
        {"beta": 1.0, "reduction": "none", "teacher_softcap": 2.0, "logit_scale": 0.3, "temperature": 0.7},
        False,
    ),
    ("float16", {"beta": 0.5, "memory_budget": 100_000, "teacher_logit_scale": 2.0}, False),
]


def divergences(rank: int, ranks: int, group: Any) -> list[Any]:
    """The loss, and the gradients of the hidden states and of this rank's part of the head, for each of them."""
    import fastloss

    found = []
    for number in range(len(DIVERGENCES)):
        case, how, upstream = divergence_problem(number)
        least = min(number, 1)  # of the first, all ranks but one have no class
        sizes = [13 - least * (ranks - 1), *[least] * (ranks - 1)]
        here = {
            n: t.split(sizes)[rank] if n.split("linear_")[-1] in ("weight", "bias") else t for n, t in case.items()
        }
        trained = [here[name].requires_grad_() for name in ("input", "linear_weight", "linear_bias")]
        loss = fastloss.linear_kl_div(**here, **how, group=group)
        found.append([loss.detach(), *torch.autograd.grad(loss, trained, upstream)])
    return found


def divergence_problem(number: int) -> tuple[dict[str, Any], dict[str, Any], Tensor]:
    """The tensors of a call, its options, and an upstream gradient."""
    dtype, how, ignored = DIVERGENCES[number]
    torch.manual_seed(number)
    shapes = {"input": (2, 5, 4), "linear_weight": (13, 4), "linear_bias": (13,)}
    shapes |= {"teacher_input": (2, 5, 3), "teacher_linear_weight": (13, 3), "teacher_linear_bias": (13,)}
    case = {name: torch.randn(shape).to(getattr(torch, dtype)) for name, shape in shapes.items()}
    if ignored:
        case["target"] = torch.tensor([[0, -100, 2, 3, 4], [5, 6, -100, 8, 9]])
    upstream = torch.rand((2, 5) if how.get("reduction") == "none" else ()).to(case["input"].dtype)
    return case, how, upstream


def best_problem(number: int) -> tuple[Tensor, Tensor, Tensor, int]:
    """Rows, a head of 13 classes (where all are wanted, two are equal), its bias, and K. Their products are exact."""
    dtype, k, rows = BEST[number]
    torch.manual_seed(number)
    x, w, b = (torch.randint(-300, 300, shape) / 64 for shape in ((rows, 4), (13, 4), (13,)))
    if k == 13:
        w[7], b[7] = w[2], b[2]
    return (*(each.to(getattr(torch, dtype)) for each in (x, w, b)), k)


def _called_linear(
    case: Linear, x: Any, w: Any, t: Any, b: Any, weight: Any, where: Any, of_rows: tuple[Any, ...]
) -> tuple[Any, Any]:
    import fastloss
    from fastloss.backends.contract import WantedParts

    options = {**case.options, **case.how, **where, "linear_bias": b if case.bias else None}
    ids, number = of_rows
    with fastloss.use_backend(case.backend):
        if case.of == "tokens":
            result = fastloss.linear_token_loss(x, w, t, of_token, number, entropy=True, **options)
            return result.loss, (result.log_probs, result.entropy)
        options["weight"] = weight
        if case.of == "statistics":
            every: dict[str, Any] = dict.fromkeys(WantedParts._fields, True)
            parts = fastloss.linear_cross_entropy_with_statistics(x, w, t, selected=ids, **every, **options)
            return combined(parts), ()
        if case.topk:
            result = fastloss.linear_cross_entropy_with_accuracy(x, w, t, topk=case.topk, **options)
            return result.loss, result.accuracy
        return fastloss.linear_cross_entropy(x, w, t, **options), ()


def grouped(case: Case, rank: int, ranks: int, group: Any, *, accuracy: bool = True) -> dict[str, Any]:
    """This rank's part of a case of :data:`GROUPS`."""
    import fastloss

    x, t, weight, upstream, v = case.tensors()
    dim, sizes = min(1, x.dim() - 1), case.shards(ranks)
    mine = x.split(sizes, dim)[rank].clone().requires_grad_()
    soft = case.target == "soft"
    target = t.split(sizes, dim)[rank].clone().requires_grad_() if soft else t
    loss, right = _called(case, fastloss, mine, target, weight, {"group": group})
    result: dict[str, Any] = {"loss": loss.detach(), "accuracy": right}
    if case.topk and accuracy:
        options = {k: v for k, v in case.options.items() if k in ("reduction", "ignore_index")}
        result["alone"] = fastloss.accuracy(mine.detach(), target.detach(), case.topk, group=group, **options)
    wanted = [mine, target] if soft else [mine]
    gradients = torch.autograd.grad(loss, wanted, upstream.to(loss.dtype), create_graph=case.second)
    result["gradients"] = [g.detach() for g in gradients]
    if case.second:
        result["second"] = torch.autograd.grad(gradients[0], wanted, v.split(sizes, dim)[rank])
    return result


def placed(case: Case, rank: int, ranks: int, *, gathered: bool = True) -> dict[str, Any]:
    """A case of :data:`PLACED`; whole tensors, which every rank has. Or, if not ``gathered``, the call alone."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    import fastloss

    x, t, weight, upstream, v = case.tensors()
    mesh = init_device_mesh("cpu", case.mesh.get(ranks, (ranks,)))
    dim, soft = min(1, x.dim() - 1), case.target == "soft"
    of = {"r": Replicate(), "s": Shard(0), "t": Shard(x.dim() - 1), "c": Shard(dim)}
    of_target = {"r": Replicate(), "s": Shard(0), "t": Shard(x.dim() - 2), "c": Replicate()}
    places = [of[letter] for letter in case.placements]
    d = distribute_tensor(x, mesh, places, src_data_rank=None).requires_grad_()
    lies = places if soft else [of_target[letter] for letter in case.placements]
    target: Tensor = distribute_tensor(t, mesh, lies, src_data_rank=None)
    if soft:
        target.requires_grad_()
    elif not set(case.placements) & set("st"):
        target = t  # the whole of it
    loss, right = _called(case, fastloss, d, target, weight, {})
    if not gathered:
        loss.backward()
        return {}
    result: dict[str, Any] = {
        "loss": loss.detach().full_tensor(),
        "accuracy": tuple(value.full_tensor() for value in right),
        "placed": [loss.placements, [value.placements for value in right]],
    }
    if case.topk:
        options = {k: v for k, v in case.options.items() if k in ("reduction", "ignore_index")}
        alone = fastloss.accuracy(d.detach(), target.detach(), case.topk, **options)
        result["alone"] = tuple(value.full_tensor() for value in alone)
    wanted = [d, target] if soft else [d]
    up = distribute_tensor(upstream.to(loss.dtype), mesh, loss.placements)
    gradients = torch.autograd.grad(loss, wanted, up, create_graph=case.second)
    result["kept placements"] = [g.placements == w.placements for g, w in zip(gradients, wanted, strict=True)]
    result["gradients"] = [g.detach().full_tensor() for g in gradients]
    if case.second:
        seconds = torch.autograd.grad(gradients[0], wanted, distribute_tensor(v, mesh, places))
        result["second"] = [g.full_tensor() for g in seconds]
    return result


def parts_of(case: Parts, rank: int, ranks: int, group: Any, *, gathered: bool = True) -> dict[str, Any]:
    """A case of :data:`STATISTICS`: parts and gradients, whole if placed, and whether these lie as the logits do."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    import fastloss

    x, t, weight, *_ = case.tensors()
    dim, soft, how = case.class_dim(), case.target == "soft", {}
    if case.placements:
        mesh = init_device_mesh("cpu", case.mesh.get(ranks, (ranks,)))
        of = {"r": Replicate(), "s": Shard(0), "c": Shard(dim)}
        of_target = of if soft else {**of, "c": Replicate()}
        places = [[of_one[letter] for letter in case.placements] for of_one in (of, of_target)]
        x, t = (distribute_tensor(*each, src_data_rank=None) for each in ((x, mesh, places[0]), (t, mesh, places[1])))
    else:
        x = x.split(case.shards(ranks), dim)[rank].clone()
        t = t.split(case.shards(ranks), dim)[rank].clone() if soft else t
        how = {"group": group}
    wanted = [tensor.requires_grad_() for tensor in ([x, t] if soft else [x])]
    with fastloss.use_backend(case.backend):
        parts = fastloss.cross_entropy_with_statistics(
            x, t, weight, **dict.fromkeys(case.asked, True), **case.options, **how
        )
        outputs = {name: getattr(parts, name) for name in case.upstreams()}
        given = [upstream.to(outputs[name].dtype) for name, upstream in case.upstreams().items()]
        if case.placements:
            given = [
                distribute_tensor(upstream, mesh, output.placements, src_data_rank=None)
                for upstream, output in zip(given, outputs.values(), strict=True)
            ]
        gradients = torch.autograd.grad(list(outputs.values()), wanted, given)
    placed = [] if not case.placements else [gradients[0].placements == x.placements]

    def whole(tensor: Any) -> Any:
        tensor = None if tensor is None else tensor.detach()
        return tensor.full_tensor() if case.placements and gathered and tensor is not None else tensor

    found = {name: whole(part) for name, part in parts._asdict().items()}
    return {"parts": found, "gradients": list(map(whole, gradients)), "kept placements": placed}


def _called(case: Case, fastloss: Any, x: Any, t: Any, weight: Any, where: Any) -> tuple[Any, tuple[Any, ...]]:
    with fastloss.use_backend(case.backend):
        if case.topk:
            result = fastloss.cross_entropy_with_accuracy(x, t, weight, topk=case.topk, **case.options, **where)
            return result.loss, result.accuracy
        return fastloss.cross_entropy(x, t, weight, **case.options, **where), ()


def main(rank: int, ranks: int, folder: Path) -> None:
    import torch.distributed as dist

    from fastloss.backends import choice
    from fastloss.ranks import collectives

    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder / 'meeting'}",
        rank=rank,
        world_size=ranks,
        timeout=timedelta(seconds=LIMIT),
    )
    results: dict[str, Any] = {}
    world = dist.group.WORLD
    for case in (*GROUPS, *PLACED, *STATISTICS, *LINEAR, *LINEAR_PLACED):
        if case.backend == "triton" and choice.triton_version() is None:
            continue
        if isinstance(case, Parts):
            found = parts_of(case, rank, ranks, world)
        elif isinstance(case, Linear):
            found = placed_linear(case, ranks) if case.placements else grouped_linear(case, rank, ranks, world)
        else:
            found = placed(case, rank, ranks) if case.placements else grouped(case, rank, ranks, world)
        results[case.name] = found
    results["best"] = best_classes(rank, ranks, world)
    results["divergences"] = divergences(rank, ranks, world)
    results["counts"] = {case.name: counted(case, rank, ranks, world) for case in COUNTED}
    # As on a GPU, where the host does not look at what the ranks tell each other first.
    told = collectives.agreed_layout
    collectives.agreed_layout = lambda *args, **how: told(*args, **{**how, "look": False})  # type: ignore[assignment]
    for case in BLIND:
        alone = grouped_linear if isinstance(case, Linear) else grouped
        results["blind", case.name] = alone(case, rank, ranks, world)  # type: ignore[operator]
    results["blind", "divergences"] = divergences(rank, ranks, world)
    results["blind", "best"] = best_classes(rank, ranks, world)
    for case in BLIND_PARTS:
        results["blind", case.name] = parts_of(case, rank, ranks, world)
    torch.save(results, folder / f"{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


class Listener(TorchDispatchMode):
    """Notes each collective's name, and how many bytes a rank gives to it."""

    def __init__(self) -> None:
        super().__init__()
        self.heard: list[tuple[str, int]] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(function)
        if "c10d" in name and "wrap_tensor" not in name and "wait_tensor" not in name:
            self.heard.append((name.split(".")[1], args[0].numel() * args[0].element_size()))
        return function(*args, **(kwargs or {}))


def counted(case: Case, rank: int, ranks: int, group: Any) -> tuple[int, list[tuple[str, int]]]:
    """The number of collectives of a case by torch's own count, and what this file's listener heard."""
    from torch.distributed.tensor.debug import CommDebugMode

    one = replace(case, second=False)
    with Listener() as listener, CommDebugMode() as mode:
        if isinstance(one, Parts):
            parts_of(one, rank, ranks, group, gathered=False)
        elif isinstance(one, Linear):
            grouped_linear(one, rank, ranks, group)
        elif one.placements:
            placed(one, rank, ranks, gathered=False)
        else:
            grouped(one, rank, ranks, group, accuracy=False)
    return mode.get_total_counts(), listener.heard


FAILURES = (
    *("rows", "options", "labels", "arguments", "label", "label, rows", "weight", "linear"),
    *("reduction", "dtype", "need", "sparse", "mesh", "parts", "switch", "dead"),
)


def failing(name: str, rank: int, group: Any) -> None:
    """A call that does not fit on one rank, the last one."""
    from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    import fastloss

    last = rank == group.size() - 1
    x, t = torch.zeros(6, 4, requires_grad=True), torch.arange(6)
    if name == "rows":
        x, t = (x[:5], t[:5]) if last else (x, t)
        fastloss.cross_entropy(x, t, group=group)
    elif name == "options":
        fastloss.cross_entropy(x, t, label_smoothing=0.1 * last, group=group)
    elif name == "labels":
        fastloss.cross_entropy(x, t + last, group=group)
    elif name == "arguments":
        fastloss.accuracy(x, t[:3] if last else t, group=group)
    elif name == "label":
        fastloss.cross_entropy(x, t + 4 * group.size(), group=group)
    elif name == "label, rows":
        mesh = init_device_mesh("cpu", (group.size(),))
        t[-1] = 4  # one of the last rank's rows
        d, labels = (distribute_tensor(each, mesh, [Shard(0)]) for each in (x.detach(), t % 5))
        fastloss.cross_entropy(d, labels)
    elif name == "weight":
        fastloss.cross_entropy(x, t, torch.ones(4 * group.size() - last), group=group)
    elif name == "linear":
        fastloss.linear_cross_entropy(torch.zeros(6, 3), torch.zeros(4, 3 - last), t, group=group)
    elif name == "reduction":
        fastloss.cross_entropy(x, t, reduction="avg" if last else "mean", group=group)
    elif name == "dtype":
        fastloss.cross_entropy(x.long() if last else x, t, group=group)
    elif name == "need":
        hidden = torch.zeros(6, 3, requires_grad=not last)
        fastloss.linear_cross_entropy(hidden, torch.zeros(4, 3, requires_grad=True), t, group=group)
    elif name == "sparse":
        fastloss.cross_entropy(x.detach().to_sparse() if last else x, t, group=group)
    elif name == "mesh":
        mesh = DeviceMesh("cpu", list(range(group.size() - 1)))
        fastloss.cross_entropy(distribute_tensor(x.detach(), mesh, [Shard(1)]), t % 4)
    elif name == "parts":
        fastloss.cross_entropy_with_statistics(x, t, entropy=last, group=group)
    elif name == "switch":
        fastloss.cross_entropy_with_statistics(x, t, entropy=0.5 if last else True, group=group)
    elif name == "dead":
        if last:
            os._exit(7)
        fastloss.cross_entropy(x, t, group=group)


def fail(rank: int, ranks: int, folder: Path) -> None:
    """Each of :data:`FAILURES` in turn; what each rank's error was goes to a file."""
    import torch.distributed as dist

    dist.init_process_group(
        "gloo", init_method=f"file://{folder / 'meeting'}", rank=rank, world_size=ranks, timeout=timedelta(seconds=20)
    )
    assert dist.group.WORLD is not None
    errors = {}
    for name in FAILURES:
        try:
            failing(name, rank, dist.group.WORLD)
            errors[name] = ("", "")
        except Exception as error:
            errors[name] = (type(error).__name__, str(error))
        torch.save(errors, folder / f"{rank}.pt")
    os._exit(0)  # the group can't be left in order: one rank is dead


def serve(rank: int, ranks: int, folder: Path) -> None:
    """Calls on DTensors that torch gets wrong or refuses, and what is right: from the whole tensors."""
    import torch.distributed as dist
    import torch.nn.functional as F
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

    import fastloss
    from fastloss.backends import choice

    dist.init_process_group("gloo", init_method=f"file://{folder / 'meeting'}", rank=rank, world_size=ranks)
    mesh, group = init_device_mesh("cpu", (ranks,)), dist.group.WORLD
    torch.manual_seed(0)
    hidden, head, weight = torch.randn(2, 6, 4), torch.randn(8, 4), torch.rand(8)
    logits, labels = hidden @ head.T, torch.randint(0, 8, (2, 6))
    found: dict[str, tuple[Tensor, Tensor]] = {}

    flat, ignored = logits.flatten(0, 1), labels.flatten().clone()
    ignored[:5] = -100
    x, h, t = (distribute_tensor(each, mesh, [Shard(0)]) for each in (flat, hidden.flatten(0, 1), ignored))
    w, of_classes = (distribute_tensor(each, mesh, [Replicate()]) for each in (head, weight))
    calls: dict[str, tuple[Any, dict[str, Any]]] = {
        "cross_entropy": (lambda **how: fastloss.cross_entropy(x, t, **how), {}),
        "weighted": (lambda **how: fastloss.cross_entropy(x, t, of_classes, **how), {"weight": weight}),
        "smoothed": (lambda **how: fastloss.cross_entropy(x, t, **how), {"label_smoothing": 0.1}),
        "linear": (lambda **how: fastloss.linear_cross_entropy(h, w, t, **how), {}),
        "statistics": (lambda **how: fastloss.cross_entropy_with_statistics(x, t, **how).loss, {}),
        "statistics, z-loss": (
            lambda **how: fastloss.cross_entropy_with_statistics(x, t, lse_square_scale=0.0, z_loss=True, **how).loss,
            {},
        ),
    }
    for name, (call, options) in calls.items():
        how = {key: value for key, value in options.items() if key != "weight"}
        right = F.cross_entropy(flat, ignored, **options)
        found[f"ignored, {name}"] = call(**how).full_tensor(), right
        torch._dynamo.reset()
        compiled = torch.compile(functools.partial(call, **how), backend="aot_eager")
        found[f"ignored, {name}, compiled"] = compiled().full_tensor(), right

    torch._dynamo.reset()
    compiled = torch.compile(lambda: fastloss.accuracy(x, t, topk=(1, 3)), backend="aot_eager")
    for k, value, right in zip((1, 3), compiled(), fastloss.accuracy(flat, ignored, topk=(1, 3)), strict=True):
        found[f"accuracy at {k}, compiled"] = value.full_tensor(), right

    for backend in ("eager", "triton") if choice.triton_version() else ("eager",):
        with fastloss.use_backend(backend):
            late = DTensor.from_local(flat / ranks, mesh, [Partial()]).requires_grad_()
            z = late.redistribute(placements=[Replicate()], async_op=True)
            right = F.cross_entropy(flat, labels.flatten())
            found[f"under way, {backend}"] = fastloss.cross_entropy(z, labels.flatten()).full_tensor(), right
            part = torch.nn.Parameter(distribute_tensor(head, mesh, [Shard(0)]))
            rows = DTensor.from_local(hidden[0], mesh, [Shard(0)])
            gathered = part.redistribute(placements=[Replicate()], async_op=True)
            F.linear(rows, gathered).to_local().square().sum().backward()
            assert part.grad is not None
            right = head - 0.1 * part.grad.full_tensor()  # type: ignore[attr-defined]
            fastloss.SGD([part], lr=0.1).step()
            found[f"a gradient under way, {backend}"] = part.detach().full_tensor(), right  # type: ignore[attr-defined]

    whole, shard = hidden.flatten(0, 1), head.chunk(ranks)[rank]
    right = F.cross_entropy(flat, labels.flatten())
    with torch.inference_mode():
        loss = fastloss.linear_cross_entropy(whole, shard, labels.flatten(), group=group)
        found["inference, group"] = loss.clone(), right
        loss = fastloss.linear_cross_entropy(whole, distribute_tensor(head, mesh, [Shard(0)]), labels.flatten())
        found["inference, DTensor"] = loss.to_local().clone(), right  # type: ignore[attr-defined]

    d, h, t = (distribute_tensor(each, mesh, [Shard(1)]).flatten(0, 1) for each in (logits, hidden, labels))
    for reduction in ("mean", "sum", "none"):
        right = F.cross_entropy(flat, labels.flatten(), reduction=reduction)
        results = {
            "cross_entropy": fastloss.cross_entropy(d, t, reduction=reduction),
            "linear": fastloss.linear_cross_entropy(h, w, t, reduction=reduction),
        }
        for name, loss in results.items():
            found[f"flattened, {name}, {reduction}"] = loss.full_tensor(), right  # type: ignore[attr-defined]
    torch.save(found, folder / f"{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    program = {"fail": fail, "serve": serve}.get(sys.argv[4] if sys.argv[4:] else "", main)
    program(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
