"""Losses and accuracies whose rows or classes several processes share: real ones, on gloo, against one process.

What each has computed is in files; the reference is computed here, in float64, by torch's own operators.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import ranks as worker
import reference
import torch
import torch.nn.functional as F
from ranks import GROUPS, LINEAR, LINEAR_PLACED, PLACED, Case, Linear
from torch import Tensor

import fastloss
from fastloss import backend as backends

HERE = Path(__file__).resolve().parent


def run_together(script: str, ranks: int, folder: Path, *arguments: str, limit: float) -> list[int | None]:
    """The exit codes of so many processes, None for one that had to be killed; what they print is in ``RANK.log``."""
    path = os.pathsep.join([str(Path(fastloss.__file__).resolve().parents[1]), str(HERE)])
    environment = {**os.environ, "PYTHONPATH": path, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    processes = []
    codes: list[int | None] = []
    try:
        for rank in range(ranks):
            with open(folder / f"{rank}.log", "w", encoding="utf-8") as log:
                command = [sys.executable, str(HERE / script), str(rank), str(ranks), str(folder), *arguments]
                processes.append(subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT))
        end = time.monotonic() + limit
        while time.monotonic() < end and any(process.poll() is None for process in processes):
            time.sleep(0.1)
    finally:
        for process in processes:
            codes.append(process.poll())
            if process.poll() is None:
                process.kill()
            process.wait()
    return codes


def logs(folder: Path) -> str:
    return "\n".join(
        f"{log.name}:\n{log.read_text(encoding='utf-8')[-3000:]}" for log in sorted(folder.glob("*.log"))
    )


@pytest.fixture(scope="module", params=[2, 4], ids=["2 ranks", "4 ranks"])
def together(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of some processes has for each case."""
    if not torch.distributed.is_available() or not torch.distributed.is_gloo_available():
        pytest.skip("needs torch.distributed with gloo")
    folder = tmp_path_factory.mktemp("together")
    codes = run_together("ranks.py", request.param, folder, limit=worker.LIMIT)
    if any(codes):
        pytest.fail(f"the processes ended with {codes}\n{logs(folder)}")
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(request.param)]


def soft_loss(x: Tensor, t: Tensor, weight: Tensor | None, options: dict[str, Any]) -> Tensor:
    """The formula of :func:`fastloss.cross_entropy`, a row each."""
    dim = min(1, x.dim() - 1)
    cap, eps = options.get("softcap"), options.get("label_smoothing", 0.0)
    z = x if cap is None else cap * torch.tanh(x / cap)
    w = (torch.ones(x.shape[dim], dtype=x.dtype) if weight is None else weight).view([-1] + [1] * (x.dim() - dim - 1))
    u = (1 - eps) * t + eps / x.shape[dim]
    if not options.get("from_logits", True):
        return -(w * u * x.log()).sum(dim)
    lse = torch.logsumexp(z, dim, keepdim=True)
    rows = (w * u * (lse - z)).sum(dim)
    return rows + options.get("lse_square_scale", 0.0) * (lse.squeeze(dim) ** 2) * (w * t).sum(dim)


def expected_loss(case: Case, x: Tensor, t: Tensor, weight: Tensor | None) -> Tensor:
    options = dict(case.options)
    if case.target == "soft":
        rows = soft_loss(x, t, weight, options)
        return {"none": rows, "sum": rows.sum(), "mean": rows.mean()}[options.get("reduction", "mean")]
    if not options.pop("from_logits", True):
        eps = options.get("label_smoothing", 0.0)
        counted = t != -100
        w = torch.ones(x.shape[1], dtype=x.dtype) if weight is None else weight
        label = torch.where(counted, t, 0)
        rows = -(1 - eps) * w[label] * x.log().gather(1, label[:, None])[:, 0] - eps / x.shape[1] * (w * x.log()).sum(
            1
        )
        return (rows * counted).sum() / (w[label] * counted).sum()
    return reference.loss(x, t, weight, **options)


def inputs(case: Case, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor | None, Tensor, Tensor]:
    x, t, weight, upstream, v = case.tensors()
    t = t.to(dtype) if case.target == "soft" else t
    return x.to(dtype), t, None if weight is None else weight.to(dtype), upstream, v.to(dtype)


def derivatives(case: Case, dtype: torch.dtype = torch.float64) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """The loss, its gradients, and the second derivative's product, in one process."""
    x, t, weight, upstream, v = inputs(case, dtype)
    wanted = [x.requires_grad_()] + ([t.requires_grad_()] if case.target == "soft" else [])
    loss = expected_loss(case, x, t, weight)
    gradients = torch.autograd.grad(loss, wanted, upstream.to(loss.dtype), create_graph=case.second)
    second = list(torch.autograd.grad(gradients[0], wanted, v)) if case.second else []
    return loss.detach(), [g.detach() for g in gradients], second


def assert_close(found: Tensor, case: Case, exact: Tensor, theirs: Tensor, what: str) -> None:
    if case.dtype == torch.float64:
        torch.testing.assert_close(found, exact, rtol=1e-11, atol=1e-12, equal_nan=True, msg=lambda m: f"{what}: {m}")
    else:
        reference.assert_no_worse(found, theirs, exact, what)


def check(case: Case, found: dict[str, Any]) -> None:
    exact, theirs = derivatives(case), derivatives(case, case.dtype)
    if case.special == "nan":
        for number in (0, 1):
            assert found["loss"][number].isnan()
            assert found["gradients"][0][number].isnan().all()
        rest = slice(2, None)
        torch.testing.assert_close(found["loss"][rest], exact[0][rest])
        torch.testing.assert_close(found["gradients"][0][rest], exact[1][0][rest])
    else:
        assert_close(found["loss"], case, exact[0], theirs[0], "loss")
        for number, gradient in enumerate(found["gradients"]):
            wants = exact[1][number]
            if case.ignored == "all":
                wants = torch.zeros_like(wants)  # torch's mean over nothing has NaN
            assert_close(gradient, case, wants, theirs[1][number], f"gradient {number}")
    for gradient, second in zip(found.get("second", []), exact[2], strict=True):
        torch.testing.assert_close(gradient, second, rtol=1e-9, atol=1e-11)
    if not case.topk:
        return
    x, t, *_ = case.tensors()
    labels = t.argmax(min(1, t.dim() - 1)) if case.target == "soft" else t
    ignore, reduction = case.options.get("ignore_index", -100), case.options.get("reduction", "mean")
    assert len(found["accuracy"]) == len(found["alone"]) == len(case.topk)
    for k, value, alone in zip(case.topk, found["accuracy"], found["alone"], strict=True):
        assert value.dtype == torch.float32
        assert torch.equal(value.nan_to_num(7), alone.nan_to_num(7))
        if reduction == "none":
            rows = x.movedim(1, -1).reshape(-1, x.shape[1])
            right = [
                float(label != ignore and reference.rank(row, label) < k)
                for row, label in zip(rows, labels.flatten().tolist(), strict=True)
            ]
            assert value.flatten().tolist() == right
            assert value.shape == labels.shape
        else:
            share = reference.accuracy(x, labels, k, ignore)
            share *= 1 if reduction == "mean" else int((labels != ignore).sum())
            assert float(value) == pytest.approx(share, nan_ok=True)


def of(case: Case, together: list[dict[str, Any]]) -> list[dict[str, Any]]:
    if case.backend == "triton" and (backends.triton_version() is None or torch.cuda.is_available()):
        pytest.skip("Triton serves no CPU tensors here")
    return [results[case.name] for results in together]


@pytest.mark.parametrize("case", GROUPS, ids=lambda case: case.name)
def test_shards_of_the_classes(together: list[dict[str, Any]], case: Case) -> None:
    """``group=``: the loss is the same on every rank, and the gradients are those of its logits."""
    found = of(case, together)
    for name in ("loss", "accuracy"):
        for other in found[1:]:
            torch.testing.assert_close(other[name], found[0][name], rtol=0, atol=0, equal_nan=True)
    dim = min(1, len(case.shape) - 1)
    whole = {**found[0]}
    for name in ("gradients", "second"):
        if name in whole:
            whole[name] = [torch.cat(parts, dim) for parts in zip(*(rank[name] for rank in found), strict=True)]
    check(case, whole)


@pytest.mark.parametrize("case", PLACED, ids=lambda case: case.name)
def test_dtensors(together: list[dict[str, Any]], case: Case) -> None:
    """Placements of all kinds: gradients lie as the input does, and a reduced loss is everywhere."""
    for found in of(case, together):
        check(case, found)
        assert all(found["kept placements"])
        of_loss, of_accuracies = found["placed"]
        assert all(placements == of_loss for placements in of_accuracies)
        if case.options.get("reduction") == "none":
            assert [p.is_shard() for p in of_loss] == [letter in "st" for letter in case.placements]
        else:
            assert all(p.is_replicate() for p in of_loss)


# ------------------------------------------------------------------------------------------------------------ linear


def linear_derivatives(case: Linear, dtype: torch.dtype = torch.float64) -> tuple[Tensor, list[Tensor], Tensor]:
    """The loss, the gradients of input, W, b and probabilities, and the logits, in one process."""
    _, t, weight, upstream, _ = case.tensors()
    x, w, b = (each.to(dtype).requires_grad_() for each in case.map())
    soft, shift = case.target == "soft", case.how.get("shift", False)
    t = t.to(dtype).requires_grad_() if soft else t
    weight = None if weight is None else weight.to(dtype)
    logits = F.linear(x, w, b if case.bias else None)
    if shift:
        logits, rows = logits[..., :-1, :], t[..., 1:]
        upstream = upstream[..., :-1] if upstream.dim() else upstream
    else:
        rows = t
    flat = logits.reshape(-1, logits.shape[-1])
    loss = expected_loss(case, flat, rows.reshape(-1, rows.shape[-1]) if soft else rows.reshape(-1), weight)
    loss = loss.view(logits.shape[:-1]) if loss.dim() else loss
    wanted = [x, w] + ([b] if case.bias else []) + ([t] if soft else [])
    return loss.detach(), list(torch.autograd.grad(loss, wanted, upstream.to(loss.dtype))), logits.detach()


def check_linear(case: Linear, found: dict[str, Any]) -> None:
    exact, theirs = linear_derivatives(case), linear_derivatives(case, case.dtype)
    assert_close(found["loss"], case, exact[0], theirs[0], "loss")
    for number, gradient in enumerate(found["gradients"]):
        wants = torch.zeros_like(exact[1][number]) if case.ignored == "all" else exact[1][number]
        assert_close(gradient, case, wants, theirs[1][number], f"gradient {number}")
    if not case.topk:
        return
    _, t, *_ = case.tensors()
    labels = t.argmax(-1) if case.target == "soft" else t
    labels = labels[..., 1:] if case.how.get("shift") else labels
    logits = exact[2].reshape(-1, exact[2].shape[-1])
    for k, value in zip(case.topk, found["accuracy"], strict=True):
        if case.options.get("reduction") == "none":
            assert value.shape == labels.shape
            right = [
                float(label != -100 and reference.rank(row, label) < k)
                for row, label in zip(logits, labels.flatten().tolist(), strict=True)
            ]
            assert value.flatten().tolist() == right
        else:
            share = reference.accuracy(logits, labels, k)
            share *= int((labels != -100).sum()) if case.options.get("reduction") == "sum" else 1
            assert float(value) == pytest.approx(share, nan_ok=True)


@pytest.mark.parametrize("case", LINEAR, ids=lambda case: case.name)
def test_shards_of_the_head(together: list[dict[str, Any]], case: Linear) -> None:
    """``group=``: every rank has the whole gradient of the input, and that of its own classes' weights."""
    found = of(case, together)
    dims = [None, 0] + ([0] if case.bias else []) + ([-1] if case.target == "soft" else [])
    gradients = []
    for number, dim in enumerate(dims):
        parts = [rank["gradients"][number] for rank in found]
        gradients.append(parts[0] if dim is None else torch.cat(parts, dim))
        if dim is None:
            for part in parts[1:]:
                assert torch.equal(part, parts[0])
    for other in found[1:]:
        assert torch.equal(other["loss"].nan_to_num(7), found[0]["loss"].nan_to_num(7))
    check_linear(case, {**found[0], "gradients": gradients})


@pytest.mark.parametrize("case", LINEAR_PLACED, ids=lambda case: case.name)
def test_dtensors_of_the_head(together: list[dict[str, Any]], case: Linear) -> None:
    for found in of(case, together):
        check_linear(case, found)
        assert all(found["kept placements"])
