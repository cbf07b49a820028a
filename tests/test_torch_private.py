"""Private names of torch: in one module, there in this torch, and dispensable where the module says so."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.optim import optimizer as optimizers

import fastloss
from fastloss.backends import torch_private

ROOT = Path(__file__).resolve().parents[1]
PRIVATE = re.compile(
    r"torch(\.\w+)*\._(?!_)|from torch\S* import _|Tensor\._(?!_)|getattr\(torch\b"
    r"|\b(profiler|forward_ad|optimizers?|of_torch)\._(?!_)"
)


@pytest.mark.parametrize("room", ["fastloss", "kernels"])
def test_private_names_are_used_in_one_module(room: str) -> None:
    for path in (ROOT / room).rglob("*.py"):
        if path != Path(torch_private.__file__):
            assert not PRIVATE.search(path.read_text(encoding="utf-8")), path


def test_this_torch_has_every_name() -> None:
    tensors = [torch.ones(2), torch.ones(2, 3)]
    check = torch_private.tensor_guard(tensors)
    assert check(*map(torch.zeros_like, tensors))
    assert not check(torch.ones(2), torch.ones(3, 2))
    assert not torch_private.step_is_observed(torch.optim.SGD(tensors))
    assert hasattr(torch.distributed.device_mesh.DeviceMesh, "_get_root_mesh")


def test_steps_are_right_without_guards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch_private, "_guards", None)
    with pytest.raises(TypeError):
        torch_private.tensor_guard([])
    params: list[list[Tensor]] = [[nn.Parameter(torch.arange(3.0)), nn.Parameter(torch.ones(2, 2))] for _ in range(2)]
    both = fastloss.SGD(params[0], 0.1, 0.9), torch.optim.SGD(params[1], 0.1, 0.9)
    for _ in range(3):
        for mine, other in zip(*params, strict=True):
            mine.grad = torch.randn_like(mine)
            other.grad = mine.grad.clone()
        for optimizer in both:
            optimizer.step()
    torch.testing.assert_close(params[0], params[1])


@pytest.mark.parametrize("name", ["pre", "post"])
@pytest.mark.parametrize("everywhere", [False, True])
def test_hooks_are_seen(name: str, everywhere: bool) -> None:
    optimizer = fastloss.SGD([nn.Parameter(torch.ones(1))])
    if everywhere:
        register = getattr(optimizers, f"register_optimizer_step_{name}_hook")
    else:
        register = getattr(optimizer, f"register_step_{name}_hook")
    assert not torch_private.step_is_observed(optimizer)
    handle = register(lambda *_: None)
    assert torch_private.step_is_observed(optimizer)
    handle.remove()
    with torch.profiler.profile():
        assert torch_private.step_is_observed(optimizer)
