"""Losses and accuracies whose rows or classes several processes share: real ones, on gloo, against one process.

What each has computed is in files; the reference is computed here, in float64, by torch's own operators.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import processes
import pytest
import ranks as worker
import reference
import torch
import torch.nn.functional as F
from ranks import GROUPS, LINEAR, LINEAR_PLACED, PLACED, STATISTICS, Case, Linear, Parts
from torch import Tensor

import fastloss
from fastloss.backends import choice


@pytest.fixture(scope="module", params=[2, pytest.param(4, marks=pytest.mark.slow)], ids=["2 ranks", "4 ranks"])
def together(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of some processes has for each case."""
    if not torch.distributed.is_available() or not torch.distributed.is_gloo_available():
        pytest.skip("needs torch.distributed with gloo")
    folder = tmp_path_factory.mktemp("together")
    codes = processes.exit_codes("ranks.py", request.param, folder, limit=worker.LIMIT)
    if any(codes):
        pytest.fail(f"the processes ended with {codes}\n{processes.logs(folder)}")
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(request.param)]


def soft_loss(x: Tensor, t: Tensor, weight: Tensor | None, options: dict[str, Any]) -> Tensor:
    """The formula of :func:`fastloss.cross_entropy`, a row each."""
    dim, z, eps = min(1, x.dim() - 1), x, options.get("label_smoothing", 0.0)
    w = (torch.ones(x.shape[dim], dtype=x.dtype) if weight is None else weight).view([-1] + [1] * (x.dim() - dim - 1))
    u = (1 - eps) * t + eps / x.shape[dim]
    if not options.get("from_logits", True):
        return -(w * u * x.log()).sum(dim)
    lse = torch.logsumexp(z, dim, keepdim=True)
    rows = (w * u * (lse - z)).sum(dim)
    return rows + options.get("lse_square_scale", 0.0) * (lse.squeeze(dim) ** 2) * (w * t).sum(dim)


OF_LOGITS = ("softcap", "logit_scale", "temperature")


def logits_of(case: Case | Linear, x: Tensor) -> Tensor:
    """z, which the softmax is of."""
    return reference.logits_of(x, **{name: case.options[name] for name in OF_LOGITS if name in case.options})


def expected_loss(case: Case, x: Tensor, t: Tensor, weight: Tensor | None) -> Tensor:
    options, x = {name: value for name, value in case.options.items() if name not in OF_LOGITS}, logits_of(case, x)
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
    if case.backend == "triton" and (choice.triton_version() is None or torch.cuda.is_available()):
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


# -------------------------------------------------------------------------------------------------------- statistics


def expected_parts(case: Parts, dtype: torch.dtype = torch.float64) -> tuple[dict[str, Tensor], list[Tensor]]:
    """The parts and the gradients, in one process."""
    x, t, weight, *_ = inputs(case, dtype)
    dim, soft = case.class_dim(), case.target == "soft"
    wanted = [x.requires_grad_()] + ([t.requires_grad_()] if soft else [])
    wide = x if dtype == torch.float64 else x.float()
    z = logits_of(case, wide)
    log_p, predicted = torch.log_softmax(z, dim), x.argmax(dim)
    loss = expected_loss(case, x, t, weight)
    bare = replace(case, options={**case.options, "lse_square_scale": 0.0})
    labels = t.argmax(dim) if soft else t
    parts = {
        "loss": loss,
        "z_loss": loss - expected_loss(bare, x, t, weight),
        "lse": torch.logsumexp(z, dim),
        "entropy": -(log_p.exp() * log_p.masked_fill(log_p == -torch.inf, 0)).sum(dim),
        "predicted": predicted,
        "correct": (predicted == labels) & (soft | (labels != case.options.get("ignore_index", -100))),
        "log_sum_sq_probs": torch.logsumexp(2 * log_p, dim),
        "mean_logit": z.mean(dim),
    }
    parts = {name: parts[name] for name in ("loss", *case.asked)}
    given = {name: upstream.to(parts[name].dtype) for name, upstream in case.upstreams().items()}
    gradients = torch.autograd.grad([parts[name] for name in given], wanted, list(given.values()))
    return {name: part.detach() for name, part in parts.items()}, list(gradients)


@pytest.mark.parametrize("case", STATISTICS, ids=lambda case: case.name)
def test_statistics(together: list[dict[str, Any]], case: Parts) -> None:
    """Every part is the same on every rank, and takes any upstream gradient."""
    found, dim = of(case, together), case.class_dim()
    (exact, gradients), (theirs, their_gradients) = expected_parts(case), expected_parts(case, case.dtype)
    for results in found:
        given = {name: part for name, part in results["parts"].items() if part is not None}
        assert given.keys() == exact.keys()
        assert all(results["kept placements"])
        for name, part in given.items():
            if part.dtype in (torch.bool, torch.int64):
                assert torch.equal(part, exact[name]), name
            else:
                assert_close(part, case, exact[name], theirs[name], name)
    for number, right in enumerate(gradients):
        of_ranks = [results["gradients"][number] for results in found]
        whole = of_ranks[0] if case.placements else torch.cat(of_ranks, dim)
        rows = slice(2 if case.special == "nan" else 0, None)
        assert whole[: rows.start].isnan().all()
        assert_close(whole[rows], case, right[rows], their_gradients[number][rows], f"gradient {number}")


# ------------------------------------------------------------------------------------------------------------ linear


def linear_derivatives(case: Linear, dtype: torch.dtype = torch.float64) -> tuple[Tensor, list[Tensor], Tensor]:
    """The loss, the gradients of input, W, b and probabilities, and the logits, in one process."""
    _, t, weight, upstream, _ = case.tensors()
    x, w, b = (each.to(dtype).requires_grad_() for each in case.map())
    soft, shift = case.target == "soft", case.how.get("shift", 0)
    t = t.to(dtype).requires_grad_() if soft else t
    weight = None if weight is None else weight.to(dtype)
    logits = F.linear(x, w, b if case.bias else None)
    if shift:
        logits, rows = logits[..., :-shift, :], t[..., shift:]
        upstream = upstream[..., :-shift] if upstream.dim() else upstream
    else:
        rows = t
    flat = logits.reshape(-1, logits.shape[-1])
    labels = rows.reshape(-1, rows.shape[-1]) if soft else rows.reshape(-1)
    expected = {"loss": expected_loss, "statistics": expected_statistics, "tokens": expected_tokens}[case.of]
    loss = expected(case, flat, labels, weight)
    loss = loss.view(logits.shape[:-1]) if loss.dim() else loss
    wanted = [x, w] + ([b] if case.bias else []) + ([t] if soft else [])
    return loss.detach(), list(torch.autograd.grad(loss, wanted, upstream.to(loss.dtype))), logits.detach()


def rows_of(case: Linear) -> tuple[Tensor, Tensor]:
    """The classes and the number of each flat row; with a shift the numbers stand where the labels stand."""
    ids, number = case.of_rows()
    if shift := case.how.get("shift"):
        ids, number = ids[..., :-shift, :], number[..., shift:]
    return ids.reshape(-1, ids.shape[-1]), number.reshape(-1)


def expected_statistics(case: Linear, x: Tensor, t: Tensor, weight: Tensor | None) -> Tensor:
    loss, without = (
        reference.loss(x, t, weight, **{**case.options, "lse_square_scale": scale})
        for scale in (case.options.get("lse_square_scale", 0.0), 0.0)
    )
    z = logits_of(case, x)
    log_p, lse = z.log_softmax(-1), z.logsumexp(-1)
    predicted, ids = x.argmax(-1), rows_of(case)[0]
    parts = fastloss.LossStatistics(
        *(loss, loss - without, lse, -(log_p.exp() * log_p).sum(-1), predicted, predicted == t),
        *((2 * log_p).logsumexp(-1), log_p.mean(-1) + lse),
        selected=log_p.gather(-1, ids),
    )
    return worker.combined(parts)


def expected_tokens(case: Linear, x: Tensor, t: Tensor, weight: Tensor | None) -> Tensor:
    log_p = logits_of(case, x).log_softmax(-1)
    counted = t != -100
    of_labels = log_p.gather(-1, torch.where(counted, t, 0).unsqueeze(1)).squeeze(1)
    rows = worker.of_token(of_labels, -(log_p.exp() * log_p).sum(-1), rows_of(case)[1].to(x.dtype))
    rows = torch.where(counted, rows, 0.0)
    reduced = {"none": rows, "sum": rows.sum(), "mean": rows.sum() / counted.sum()}
    return reduced[case.options.get("reduction", "mean")]


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
    labels = labels[..., case.how.get("shift", 0) :]
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


# ------------------------------------------------------------------------------------------- what the ranks tell


def test_collectives_and_their_bytes(together: list[dict[str, Any]]) -> None:
    """Forward and backward: at most two collectives of a few float64 numbers a row; nothing grows with the classes.

    A group's ranks first tell each other what they have, in 40 bytes; a mesh knows.
    """
    hello = ("all_gather_into_tensor", 40)

    def gathered(numbers: int, rows: int = 7) -> tuple[str, int]:
        return "all_gather_into_tensor", 8 * numbers * rows

    def reduced(numbers: int, rows: int = 1) -> tuple[str, int]:
        return "all_reduce", 8 * numbers * rows

    # lse, z_y, Σ w z where there is smoothing, and the rank; of probabilities nll and mass in the place of z_y
    expected = {
        "plain": [hello, gathered(2)],
        "with accuracy": [hello, reduced(1, 7), gathered(4)],
        "many classes": [hello, reduced(1, 7), gathered(4)],
        "soft": [hello, gathered(4)],
        "soft with accuracy": [hello, gathered(3), gathered(4)],
        "D classes": [gathered(3)],
        "D classes with accuracy": [reduced(1, 7), gathered(4)],
        # Is something wrong on a rank? What do the means divide by? The loss, and how many rows are right.
        "D rows": [reduced(1), reduced(2), reduced(3)],
        # lse, z_y, Σ w z, H, log Σ p², Σ z, the greatest logit and its class
        "statistics": [hello, gathered(8)],
        # As of soft targets; the numbers of rows, z_y too; the greatest probability and its class.
        "statistics of soft": [hello, gathered(3), gathered(7), gathered(2)],
        "lse of soft": [hello, gathered(3)],
        "D statistics of classes": [gathered(8)],
        "D statistics of rows": [reduced(1), reduced(2), reduced(2)],
        "linear": [hello, *[gathered(2, 3)] * 3, reduced(5, 9)],  # 9 rows, 3 a chunk; the input's gradient
        "linear with accuracy": [hello, *[reduced(1, 3), gathered(3, 3)] * 3, reduced(5, 9)],
    }
    for results in together:
        found = dict(results["counts"])
        both = found.pop("D both")[1]  # the rows' small numbers around the classes' own, which are as above
        rows = -(-7 // 2)
        assert [one for one in both if one[1] >= 8 * (rows - 1)][-3:-1] != []
        assert len(both) == 5
        for name, (number, heard) in found.items():
            assert number == len(heard), f"{name}: torch counts {number}"
            assert heard == expected[name], name


@pytest.mark.parametrize("case", worker.BLIND, ids=lambda case: case.name)
def test_a_host_that_does_not_look(together: list[dict[str, Any]], case: Case) -> None:
    """As on a GPU: where this rank's classes stand is known to the device alone, and the results are the same."""
    for results in together:
        found, looked = results["blind", case.name], results[case.name]
        torch.testing.assert_close(found["loss"], looked["loss"], rtol=1e-13, atol=1e-13)
        torch.testing.assert_close(found["accuracy"], looked["accuracy"])
        torch.testing.assert_close(found["gradients"], looked["gradients"], rtol=1e-12, atol=1e-13)


def test_best_classes(together: list[dict[str, Any]]) -> None:
    """As of one process, on every rank; the lower one of two classes that are equal on different ranks is first."""
    for results in together:
        found, unseen = iter(results["best"]), results["blind", "best"]
        torch.testing.assert_close(results["best"], unseen, rtol=0, atol=0)
        for number in range(len(worker.BEST)):
            x, w, b, k = worker.best_problem(number)
            whole = fastloss.linear_topk_log_probs(x, w, k, linear_bias=b, softcap=50.0)
            for _ in range(4):
                log_probs, ids = next(found)
                assert torch.equal(ids, whole.ids)
                torch.testing.assert_close(log_probs, whole.log_probs, rtol=1e-6, atol=1e-6)


def test_divergences(together: list[dict[str, Any]]) -> None:
    """As of one process: the loss and the hidden states' gradient on every rank, the heads' gradients in parts."""
    for number in range(len(worker.DIVERGENCES)):
        case, how, upstream = worker.divergence_problem(number)
        trained = [case[name].requires_grad_() for name in ("input", "linear_weight", "linear_bias")]
        loss = fastloss.linear_kl_div(**case, **how)
        whole = [loss.detach(), *torch.autograd.grad(loss, trained, upstream)]
        narrow = whole[0].dtype == torch.float16
        limits: dict[str, Any] = {"rtol": 4e-3, "atol": 4e-3} if narrow else {"rtol": 1e-5, "atol": 1e-6}
        parts = [results["divergences"][number] for results in together]
        torch.testing.assert_close(parts, [results["blind", "divergences"][number] for results in together], **limits)
        for loss, of_input, *_ in parts:
            torch.testing.assert_close([loss, of_input], whole[:2], **limits)
        for place in (2, 3):
            torch.testing.assert_close(torch.cat([part[place] for part in parts]), whole[place], **limits)


def test_divergences_of_a_group(alone: Any) -> None:
    """A call that one rank can refuse alone; second derivatives; DTensors."""
    from torch.distributed.tensor import Shard

    head, call = torch.randn(4, 4, requires_grad=True), fastloss.linear_kl_div
    with pytest.raises(ValueError, match="linear_weight has 4 classes and teacher_linear_weight 3"):
        call(X, head, X, torch.ones(3, 4), group=alone)
    with pytest.raises(ValueError, match="linear_weight is a DTensor; expected this rank's shard"):
        call(X, dtensor(head.detach(), Shard(0)), X, torch.ones(4, 4))
    (gradient,) = torch.autograd.grad(call(X, head, X, torch.eye(4), group=alone), head, retain_graph=True)
    (expected,) = torch.autograd.grad(call(X, head, X, torch.eye(4)), head)
    torch.testing.assert_close(gradient, expected)
    with pytest.raises(RuntimeError, match="no second derivative; with create_graph=True gather both heads"):
        torch.autograd.grad(call(X, head, X, torch.eye(4), group=alone), head, create_graph=True)
    with pytest.raises(RuntimeError, match="accumulate_grad=True beside a linear_weight that is not a leaf"):
        call(X, head * 1, X, torch.eye(4), accumulate_grad=True, group=alone)


def test_best_classes_of_a_group(alone: Any) -> None:
    """More classes than there are; a group beside DTensors."""
    from torch.distributed.tensor import Shard

    with pytest.raises(ValueError, match="k is 5, and linear_weight has 4 classes"):
        fastloss.linear_topk_log_probs(X, torch.ones(4, 4), 5, group=alone)
    with pytest.raises(ValueError, match="group is given beside a DTensor"):
        fastloss.linear_topk_log_probs(X, dtensor(torch.ones(4, 4), Shard(0)), 2, group=alone)


@pytest.mark.parametrize("case", worker.BLIND_PARTS, ids=lambda case: case.name)
def test_statistics_of_a_host_that_does_not_look(together: list[dict[str, Any]], case: Parts) -> None:
    for results in together:
        found, looked = results["blind", case.name], results[case.name]
        torch.testing.assert_close(found, looked, rtol=1e-12, atol=1e-13)


@pytest.fixture(scope="module")
def failures(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, tuple[str, str]]]:
    """The errors of three processes, the last of which dies in the end; none of them hangs."""
    if not torch.distributed.is_available() or not torch.distributed.is_gloo_available():
        pytest.skip("needs torch.distributed with gloo")
    folder = tmp_path_factory.mktemp("failures")
    codes = processes.exit_codes("ranks.py", 3, folder, "fail", limit=worker.LIMIT)
    if codes != [0, 0, 7]:
        pytest.fail(f"the processes ended with {codes}\n{processes.logs(folder)}")
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(3)]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "others", "last"),
    [
        ("rows", r"RuntimeError.*differ in their rows: 6 on rank 0, 6 on rank 1, 5 on rank 2", None),
        ("options", r"RuntimeError.*differ in their options", None),
        ("labels", r"RuntimeError.*differ in their labels", None),
        ("arguments", r"RuntimeError.*rank 2 of the group refused", r"ValueError.*target has shape \(3,\)"),
        ("label", r"IndexError.*target\[0\] is 12.*\[0, 12\)", None),
        ("label, rows", r"IndexError.*on another of the 3 ranks", r"IndexError.*target\[0\] is 4"),
        ("weight", r"RuntimeError.*differ in their options", None),
        ("linear", r"RuntimeError.*rank 2 of the group refused", r"RuntimeError.*with the same D"),
        ("reduction", r"RuntimeError.*rank 2 of the group refused", r"ValueError.*'avg' is not a valid"),
        ("dtype", r"RuntimeError.*rank 2 of the group refused", r"NotImplementedError.*torch.int64"),
        ("need", r"RuntimeError.*differ in their options.* or need of input's gradient", None),
        ("sparse", r"RuntimeError.*rank 2 of the group refused", r"RuntimeError.*input has layout torch.sparse_coo"),
        ("parts", r"RuntimeError.*differ in their options, parts", None),
        (
            "switch",
            r"RuntimeError.*rank 2 of the group refused",
            r"TypeError.*entropy is 0.5; expected True or False",
        ),
        ("mesh", r"^: $", r"RuntimeError.*this process \(rank 2\) is none of its ranks"),
    ],
)
def test_what_is_wrong_on_one_rank_is_an_error_on_all(
    failures: list[dict[str, tuple[str, str]]], name: str, others: str, last: str | None
) -> None:
    for rank, errors in enumerate(failures):
        pattern = last if last and rank == 2 else others
        assert re.search(pattern, ": ".join(errors[name])), f"rank {rank}: {errors[name]}"


@pytest.mark.slow
def test_dtensors_that_torch_gets_wrong_or_refuses(tmp_path: Path) -> None:
    """Ranks with unequal numbers of ignored labels, collectives under way, inference mode, flattened sequences."""
    if not torch.distributed.is_available() or not torch.distributed.is_gloo_available():
        pytest.skip("needs torch.distributed with gloo")
    codes = processes.exit_codes("ranks.py", 2, tmp_path, "serve", limit=worker.LIMIT)
    assert codes == [0, 0], processes.logs(tmp_path)
    for rank in range(2):
        for name, (found, right) in torch.load(tmp_path / f"{rank}.pt").items():
            torch.testing.assert_close(found, right, msg=lambda message, name=name: f"{name}: {message}")


@pytest.mark.slow
def test_a_rank_that_dies_is_an_error_on_the_others(failures: list[dict[str, tuple[str, str]]]) -> None:
    """The engine's own, at the latest when its timeout is over."""
    assert "dead" not in failures[2]
    for errors in failures[:2]:
        assert errors["dead"][0]


# ---------------------------------------------------------------------------------------------------------- bad input


X, T = torch.arange(24.0).view(6, 4), torch.arange(6) % 4


def test_a_group_without_torch_distributed() -> None:
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        pytest.skip("it is initialised")
    with pytest.raises(RuntimeError, match=r"group is given, but torch.distributed is not initialised"):
        fastloss.cross_entropy(X, T, group=object())


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A group of one process, this one."""
    import torch.distributed as dist

    if not dist.is_available() or not dist.is_gloo_available():
        pytest.skip("needs torch.distributed with gloo")
    if dist.is_initialized():
        pytest.skip("this process is in a group already")
    store = dist.FileStore(str(tmp_path_factory.mktemp("alone") / "store"), 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield dist.group.WORLD
    dist.destroy_process_group()


def dtensor(tensor: Tensor, *placements: Any) -> Any:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor

    mesh = init_device_mesh("cpu", (1,) * len(placements))
    return DTensor.from_local(tensor, mesh, placements, run_check=False)


def test_placements_that_cannot_be_served(alone: Any) -> None:
    """Each error names what the placements were and what would do."""
    from torch.distributed.tensor import Partial, Replicate, Shard

    losses = (fastloss.cross_entropy, fastloss.cross_entropy_with_accuracy, fastloss.cross_entropy_with_statistics)
    for call in (fastloss.accuracy, *losses):
        with pytest.raises(ValueError, match=r"Partial\(sum\).* can't be served; expected Replicate\(\) or Shard"):
            call(dtensor(X, Partial()), T)
        with pytest.raises(ValueError, match=r"shards the classes over dimensions \[0, 1\] of the mesh; expected"):
            call(dtensor(X, Shard(1), Shard(-1)), T)
        with pytest.raises(ValueError, match=r"target is a plain tensor, and input is placed as .*Shard.*DTensor"):
            call(dtensor(X, Shard(0)), T)
        with pytest.raises(ValueError, match=r"target is placed as \(Shard\(dim=0\),\), and input is .*Replicate"):
            call(dtensor(X, Replicate()), dtensor(T, Shard(0)))
        with pytest.raises(ValueError, match=r"target is placed as .*Shard.*Shard\(dim=1\).*expected the target as"):
            call(dtensor(X, Shard(1)), dtensor(T, Shard(0)))
        with pytest.raises(ValueError, match="group is given beside a DTensor"):
            call(dtensor(X, Shard(1)), T, group=alone)
    other = dtensor(T, Replicate(), Replicate())
    with pytest.raises(ValueError, match=r"target is on DeviceMesh.*input's mesh"):
        fastloss.cross_entropy(dtensor(X, Shard(1)), other)


def test_placements_of_a_head_that_cannot_be_served(alone: Any) -> None:
    from torch.distributed.tensor import Partial, Replicate, Shard

    w, call = torch.ones(4, 4), fastloss.linear_cross_entropy
    for placements in ((Shard(0), Shard(0)), (Shard(1), Replicate()), (Replicate(), Shard(1))):
        with pytest.raises(ValueError, match=r"input is placed as .* and linear_weight as .*; expected on each dim"):
            call(dtensor(X, placements[0]), dtensor(w, placements[1]), T)
    with pytest.raises(ValueError, match=r"linear_weight is placed as .*Partial.*redistribute"):
        call(dtensor(X, Replicate()), dtensor(w, Partial()), T)
    with pytest.raises(ValueError, match="linear_weight is a plain tensor beside DTensors"):
        call(dtensor(X, Replicate()), w, T)
    with pytest.raises(ValueError, match="linear_bias is a plain tensor beside DTensors"):
        call(X, dtensor(w, Shard(0)), T, linear_bias=torch.ones(4))
    with pytest.raises(ValueError, match=r"linear_bias is placed as .*; expected \(Shard"):
        call(X, dtensor(w, Shard(0)), T, linear_bias=dtensor(torch.ones(4), Replicate()))
    with pytest.raises(ValueError, match="target is a plain tensor, and input is placed as"):
        call(dtensor(X, Shard(0)), dtensor(w, Replicate()), T)
    x = X.view(2, 3, 4)
    with pytest.raises(ValueError, match=r"shift=1 with positions that are sharded"):
        call(dtensor(x, Shard(1)), dtensor(w, Replicate()), dtensor(T.view(2, 3), Shard(1)), shift=True)
    with pytest.raises(RuntimeError, match="accumulate_grad=True beside a linear_weight that is a DTensor"):
        call(X, dtensor(w, Shard(0)).requires_grad_(), T, accumulate_grad=True)
    with pytest.raises(ValueError, match="K-dimensional loss, over several ranks"):
        call(X, torch.ones(4, 2, 4), torch.zeros(6, 2, dtype=torch.long), group=alone)


def test_groups_that_are_none(alone: Any) -> None:
    from torch.distributed.device_mesh import init_device_mesh

    with pytest.raises(TypeError, match=r"group must be a torch.distributed ProcessGroup, got str"):
        fastloss.cross_entropy(X, T, group="tensor")
    with pytest.raises(TypeError, match=r"got DeviceMesh; pass mesh.get_group\(\)"):
        fastloss.accuracy(X, T, group=init_device_mesh("cpu", (1,)))
    with pytest.raises(RuntimeError, match=r"weight has shape \(3,\); expected one weight for each class: \(4,\)"):
        fastloss.cross_entropy(X, T, torch.ones(3), group=alone)
    with pytest.raises(RuntimeError, match="weight requires grad, and over several ranks"):
        fastloss.cross_entropy(X, torch.softmax(X, 1), torch.ones(4, requires_grad=True), group=alone)
    with pytest.raises(ValueError, match="the least that would do is"):
        fastloss.linear_cross_entropy(X, torch.ones(4, 4), T, memory_budget=10, group=alone)


def test_statistics_of_special_rows_of_a_group(alone: Any) -> None:
    """Rows of −inf alone, of NaN and of +inf are what they are without a group."""
    input = X.clone()
    input[0], input[1, 2], input[2, 1], input[3, :2] = -torch.inf, torch.nan, torch.inf, -torch.inf
    every: dict[str, Any] = {"reduction": "none", **dict.fromkeys(worker.PARTS, True)}
    results = []
    for where in ({}, {"group": alone}):
        x = input.clone().requires_grad_()
        with fastloss.use_backend("eager"):
            parts: Any = fastloss.cross_entropy_with_statistics(x, T, **every, **where)
        totals = parts.mean_logit.sum(), sum(getattr(parts, name)[3:].sum() for name in ("loss", "lse", "entropy"))
        results.append([*parts[:8], *(torch.autograd.grad(total, x, retain_graph=True)[0] for total in totals)])
    torch.testing.assert_close(results[1], results[0], equal_nan=True)


@pytest.mark.parametrize("options", [{}, {"is_grads_batched": True}, {"create_graph": True}], ids=str)
def test_second_derivatives_over_shards_of_the_classes_are_refused(alone: Any, options: dict[str, bool]) -> None:
    """First derivatives are as ever; the error says what to do for others."""
    from torch.distributed.tensor import Shard

    x, t = X.clone().requires_grad_(), torch.softmax(X, 1)
    calls = {
        "gather the classes first": [
            fastloss.cross_entropy(x, T, group=alone),
            fastloss.cross_entropy(x, t, group=alone),
            fastloss.cross_entropy_with_accuracy(x, T, group=alone, label_smoothing=0.1).loss,
            fastloss.cross_entropy(dtensor(x, Shard(1)), T).to_local(),
            fastloss.cross_entropy_with_statistics(x, T, entropy=True, group=alone).entropy.sum(),  # type: ignore[union-attr]
        ],
        "gather linear_weight first": [fastloss.linear_cross_entropy(x, torch.eye(4), T, group=alone)],
    }
    for words, losses in calls.items():
        for loss in losses:
            if not options:
                torch.autograd.grad(loss, x)
                continue
            upstream = torch.ones(2) if "is_grads_batched" in options else None
            with pytest.raises(RuntimeError, match=rf"no second derivative; with create_graph=True {words}"):
                torch.autograd.grad(loss, x, upstream, **options)


def test_modules_and_compilers(alone: Any) -> None:
    """The modules hand the group on; a compiler leaves such a call to Python."""
    loss = fastloss.CrossEntropyLoss(label_smoothing=0.1, group=alone)
    torch.testing.assert_close(loss(X, T), F.cross_entropy(X, T, label_smoothing=0.1))
    compiled = torch.compile(loss, backend="eager")
    torch.testing.assert_close(compiled(X, T), F.cross_entropy(X, T, label_smoothing=0.1))
    head = fastloss.LinearCrossEntropyLoss(4, 4, weight=torch.arange(1.0, 5.0), group=alone)
    expected = F.cross_entropy(F.linear(X, head.linear.weight), T, torch.arange(1.0, 5.0))
    torch.testing.assert_close(head(X, T), expected)


def test_twice_backward_and_no_grad(alone: Any) -> None:
    """Under ``retain_graph`` both passes are right, and without a graph nothing is kept."""
    from torch.distributed.tensor import Replicate

    for call in (
        lambda x: fastloss.cross_entropy(x, T, group=alone),
        lambda x: fastloss.linear_cross_entropy(x, torch.eye(4), T, group=alone),
        lambda x: fastloss.cross_entropy(dtensor(x, Replicate()), T).to_local(),
        lambda x: fastloss.cross_entropy_with_statistics(x, T, lse=True, group=alone).loss,
    ):
        x = X.clone().requires_grad_()
        loss = call(x)
        first = torch.autograd.grad(loss, x, torch.tensor(3.0), retain_graph=True)[0].clone()
        second = torch.autograd.grad(loss, x)[0]
        expected = torch.autograd.grad(F.cross_entropy(x, T), x)[0]
        torch.testing.assert_close(second, expected)
        torch.testing.assert_close(first, 3 * expected)
        with torch.no_grad():
            assert not call(x).requires_grad


def test_class_weights_of_a_column(alone: Any) -> None:
    """The kernels read them as if they lay one after the other."""
    from torch.distributed.tensor import Replicate, Shard

    weight = torch.arange(1.0, 9.0).view(4, 2)[:, 0]
    expected = F.cross_entropy(X, T, weight)
    with fastloss.use_backend("triton" if fastloss.backends.choice.triton_version() else "eager"):
        found = [
            fastloss.cross_entropy(X, T, weight, group=alone),
            fastloss.linear_cross_entropy(X, torch.eye(4), T, weight=weight, group=alone),
            fastloss.cross_entropy(dtensor(X, Shard(0)), dtensor(T, Shard(0)), weight).full_tensor(),
            fastloss.linear_cross_entropy(
                dtensor(X, Shard(0)), dtensor(torch.eye(4), Replicate()), dtensor(T, Shard(0)), weight=weight
            ).full_tensor(),
        ]
    for loss in found:
        torch.testing.assert_close(loss, expected)
