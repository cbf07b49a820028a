"""docs/optimizers.md and docs/optimizers.py: the tables are those that the script prints, and the programs run."""

from __future__ import annotations

import importlib.util
import math
import re
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastloss
from fastloss import demo

if demo.missing_extras():
    pytest.skip('docs/optimizers.py needs pip install "fastloss[demo]"', allow_module_level=True)

DOCS = Path(__file__).resolve().parents[1] / "docs"
PAGE = (DOCS / "optimizers.md").read_text(encoding="utf-8")
TINY = ["--epochs", "1", "--seeds", "2", "--fewer-seeds", "1"]


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("docs_optimizers", DOCS / "optimizers.py")
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)  # dataclasses look there
    spec.loader.exec_module(module)
    return module


def tables(text: str) -> dict[str, list[list[str]]]:
    """The tables after a "printed" mark, as rows of cells, by their names."""
    found = re.findall(r"^<!-- printed: (.*?) -->\n((?:\|.*\n)+)", text, re.MULTILINE)
    return {
        name: [[cell.strip() for cell in line.strip("|").split("|")] for line in rows.splitlines()]
        for name, rows in found
    }


def form(table: list[list[str]]) -> list[list[str]]:
    """The table with its results masked: 2.31 becomes 0.00, and a learning rate that was chosen becomes γ."""

    def masked(cell: str, column: str) -> str:
        if column == "learning rate":
            return "γ"
        return re.sub(r"\d+\.(\d+)(?!\d|:)", lambda m: "0." + "0" * len(m[1]), cell.strip("*"))

    return [[masked(cell, column) for cell, column in zip(row, table[0], strict=True)] for row in table]


@pytest.mark.slow
def test_the_page_has_the_tables_that_the_script_prints(
    script: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    picture = tmp_path / "picture.png"
    state, threads = torch.get_rng_state(), torch.get_num_threads()
    script.main([*TINY, "--output", str(picture)])
    first = capsys.readouterr().out
    assert picture.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.get_num_threads() == threads

    printed, committed = tables(first), tables(PAGE)
    assert list(printed) == ["sweep", "comparison", "schedules", "16 bits", "buffers"]
    assert list(committed) == list(printed)
    for name, table in printed.items():
        assert form(committed[name]) == form(table)
    assert committed["buffers"] == printed["buffers"]  # which are as long in the tiny mode

    script.main([*TINY, "--output", str(picture)])
    assert capsys.readouterr().out == first


def test_the_committed_tables_agree_with_each_other() -> None:
    committed = tables(PAGE)
    chosen = {}
    for name, *cells in committed["sweep"][2:]:
        losses = [float(cell.strip("*").split(": ")[1]) for cell in cells]
        (best,) = (i for i, cell in enumerate(cells) if cell.startswith("**"))
        assert losses[best] == min(losses)
        assert 0 < best < len(cells) - 1, "the best rate is at an end of the list"
        chosen[name] = cells[best].strip("*").split(": ")[0]
    assert chosen == {row[0]: row[1] for row in committed["comparison"][2:]}
    for row in committed["16 bits"][2:]:
        weight, state, both = map(int, re.findall(r"\d+", row[1]))
        assert weight + state == both


def test_every_result_in_the_text_is_in_a_table() -> None:
    text = re.sub(r"^(?:\|.*|    .*)$|^```.*?^```$", "", PAGE, flags=re.MULTILINE | re.DOTALL)
    assert re.findall(r"\b\d+\.\d{3,}|\b\d\d\.\d+ ?%", text) == []  # results are in the tables alone
    rates = {"0.3", "0.1", "0.9", "0.002", "0.01", "0.99"}
    spreads = set(re.findall(r"± (0\.\d)\b", "".join(row[-1] for row in tables(PAGE)["comparison"])))
    assert set(re.findall(r"\b0\.\d+", text)) <= rates | spreads | {"0.2"}  # a scan in 450


def test_the_picture_is_there_and_readme_links_the_page() -> None:
    assert (DOCS / "optimizers.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert "](optimizers.png)" in PAGE
    assert "(docs/optimizers.md)" in (DOCS.parent / "README.md").read_text(encoding="utf-8")


@pytest.mark.slow
def test_plain_bfloat16_stalls_and_the_options_learn(script: ModuleType) -> None:
    split = script.digits(0, torch.device("cpu"))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        found = script.sixteen_bits(script.Scans(*split), [0], 15, lambda: None)
    finally:
        torch.set_num_threads(threads)
    learnt = {name: runs[0].losses[0] - runs[0].losses[-1] for name, runs in found.items()}
    for name in ("bfloat16", "momentum_dtype=torch.float32"):
        assert learnt[name] < 0.5 * learnt["float32"]
    for name in ("stochastic_rounding=True", "kahan_sum=True", "master_weights=True"):
        assert learnt[name] == pytest.approx(learnt["float32"], rel=0.1)


# -------------------------------------------------------------------------------------------- the page's programs


def programs() -> list[Callable[..., dict[str, Any]]]:
    def runner(block: str) -> Callable[..., dict[str, Any]]:
        def run(**given: Any) -> dict[str, Any]:
            names = {"torch": torch, "fastloss": fastloss, **given}
            exec(compile(block, "optimizers.md", "exec"), names)
            return names

        return run

    return [runner(block) for block in re.findall(r"^```python\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)]


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Linear(8, 4)


@pytest.fixture
def batches() -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [(20 * torch.randn(16, 8, generator=generator), torch.arange(16) % 4) for _ in range(5)]


def test_the_schedule_is_the_formula_and_the_scripts(script: ModuleType, model: nn.Module) -> None:
    steps, warm_steps = 50, 5
    schedule, *_ = programs()
    names = schedule(model=model, steps=steps)
    optimizer, scheduler = names["optimizer"], names["schedule"]
    again = fastloss.SGD(model.parameters(), lr=0.3, momentum=0.9)
    of_the_script = script.warm_up_then_cosine(again, steps)
    for t in range(steps):
        if t <= warm_steps:
            expected = 0.3 * (0.01 + 0.99 * t / warm_steps)
        else:
            expected = 0.3 / 2 * (1 + math.cos(math.pi * (t - warm_steps) / (steps - warm_steps)))
        assert optimizer.param_groups[0]["lr"] == pytest.approx(expected)
        assert again.param_groups[0]["lr"] == pytest.approx(expected)
        for each in (optimizer, scheduler, again, of_the_script):
            each.step()
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0, abs=1e-12)


def test_clipping_in_the_step_is_clip_grad_norm(
    model: nn.Module, batches: list[tuple[Tensor, Tensor]], capsys: pytest.CaptureFixture[str]
) -> None:
    by_torch = nn.Linear(8, 4)
    by_torch.load_state_dict(model.state_dict())
    _, clipping, _ = programs()
    clipping(model=model, batches=batches)
    printed = capsys.readouterr().out.splitlines()

    optimizer = torch.optim.SGD(by_torch.parameters(), lr=0.3, momentum=0.9)
    norms = []
    for input, target in batches:
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(by_torch(input), target).backward()
        norms.append(nn.utils.clip_grad_norm_(by_torch.parameters(), 1.0))
        optimizer.step()
    assert max(norms) > 1
    assert printed == [f"gradient norm {norm:.2f}" for norm in norms]
    for ours, theirs in zip(model.parameters(), by_torch.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_the_grad_scaler_program_trains(model: nn.Module, batches: list[tuple[Tensor, Tensor]]) -> None:
    before = [param.detach().clone() for param in model.parameters()]
    *_, scaling = programs()
    names = scaling(model=model, batches=batches * 10, device="cpu")
    assert names["scaler"].get_scale() > 1
    assert torch.isfinite(names["loss"])
    assert all(not torch.equal(param, old) for param, old in zip(model.parameters(), before, strict=True))
