"""The demo at a tiny size: what it measures, prints and draws. No test asks how long anything takes."""

from __future__ import annotations

import math
import os
import struct
from functools import partial
from pathlib import Path

import pytest
import torch

import fastloss
from fastloss import demo
from fastloss.demo import alone, language_model, training
from fastloss.demo.alone import Case
from fastloss.demo.training import PYTORCH, largest_difference
from fastloss.measuring import clock, inputs, machine, reference

if demo.missing_extras():
    pytest.skip('the demo needs pip install "fastloss[demo]"', allow_module_level=True)

from fastloss.measuring.machine import bytes_in_words
from fastloss.measuring.style import TIMES

CPU = torch.device("cpu")
SMALL = language_model.Size(passages=5, tokens=64, features=4, steps=2)
CASES = (Case(64, 1000, torch.float32), Case(64, 1000, torch.bfloat16))


@pytest.fixture(scope="module")
def split() -> training.Split:
    return training.digits(0, CPU)


@pytest.fixture(scope="module")
def short(split: training.Split) -> training.Training:
    return training.train_side_by_side(split, epochs=3, seed=0)


def size_of_png(path: Path) -> tuple[int, int]:
    """Width and height, from the header chunk that every PNG starts with."""
    start = path.read_bytes()[:24]
    assert start[:8] == b"\x89PNG\r\n\x1a\n"
    assert start[12:16] == b"IHDR"
    width, height = struct.unpack(">II", start[16:24])
    return width, height


@pytest.mark.slow
def test_the_whole_demo(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "demo.png"
    settings = demo.Settings(
        output,
        epochs=2,
        cases=CASES,
        seconds_a_case=0.01,
        optimizer_width=8,
        seconds_of_optimizer=0.01,
        device=CPU,
        language_model=SMALL,
    )
    outcome = demo.run(settings)

    assert min(size_of_png(output)) > 1000
    assert output.stat().st_size > 50_000
    assert [result.case for result in outcome.at_scale] == list(CASES)
    printed = capsys.readouterr().out
    for run in (outcome.training.pytorch, outcome.training.fastloss):
        assert f"{run.epoch_losses[0]:.6f}" in printed
        assert f"{run.held_out[-1]:.2%}" in printed
        assert f"{run.median_step * 1e6:.0f} µs" in printed
    for result in outcome.at_scale:
        assert result.case.words[0] in printed
        for measured in (result.pytorch, result.fastloss):
            assert f"{measured.loss.median * 1e3:.1f} ms" in printed
            assert f"{measured.errors.gradient_norm:.1e}" in printed
    model = outcome.language_model
    assert f"{model.text_bytes / 1e6:.1f} MB of Python's own source" in printed
    for side in (model.pytorch, model.fastloss):
        assert f"{side.losses[0]:.6f}" in printed
        assert f"{side.losses[-1]:.6f}" in printed
        assert f"{side.median_step * 1e3:.1f} ms" in printed
        assert bytes_in_words(side.peak_bytes) in printed
    saved = next(line for line in printed.splitlines() if "memory saved" in line)
    assert bytes_in_words(model.saved_bytes) in saved
    for compared in outcome.optimizer.compared:
        assert compared.name in printed
        for seconds, error in zip(compared.seconds, compared.errors, strict=True):
            assert f"{seconds * 1e3:.2f} ms" in printed
            assert f"{error:.1e}" in printed


def test_the_split_is_real_stratified_and_disjoint(split: training.Split) -> None:
    assert (len(split.train), len(split.held_out)) == (1347, 450)
    assert 0 == split.train.min() < split.train.max() == 1
    for digit in range(10):
        trained, held_out = (split.train_digit == digit).sum(), (split.held_out_digit == digit).sum()
        assert 0.24 < held_out / (trained + held_out) < 0.26
    twins = (split.held_out[:, None] == split.train[None]).all(2).any(1)
    assert twins.sum() == 0


def test_both_runs_learn_and_agree(short: training.Training) -> None:
    assert short.pytorch.losses[0] == pytest.approx(short.fastloss.losses[0], abs=1e-6)
    assert largest_difference(short.pytorch, short.fastloss) < 1e-4
    assert short.equal_predictions >= 0.99 * short.held_out
    for run in (short.pytorch, short.fastloss):
        assert run.epoch_losses[-1] < 0.8 * run.epoch_losses[0]
        assert run.held_out[-1] > 0.5
        assert len(run.losses) == len(run.seconds) == 3 * (1347 // training.BATCH)
        assert run.peak_bytes > 0


def test_each_run_has_the_optimizer_of_its_side(short: training.Training) -> None:
    assert type(short.pytorch.optimizer) is torch.optim.SGD
    assert type(short.fastloss.optimizer) is fastloss.SGD
    theirs, ours = (run.optimizer.param_groups[0] for run in (short.pytorch, short.fastloss))
    assert {name: ours[name] for name in ("lr", "momentum", "weight_decay")} == {
        name: theirs[name] for name in ("lr", "momentum", "weight_decay")
    }


def test_the_same_seed_gives_the_same_run(split: training.Split, short: training.Training) -> None:
    again = training.train_side_by_side(split, epochs=3, seed=0)
    other = training.train_side_by_side(split, epochs=3, seed=1)
    assert again.fastloss.losses == short.fastloss.losses
    assert again.pytorch.losses == short.pytorch.losses
    assert other.fastloss.losses != short.fastloss.losses


def test_training_leaves_the_callers_state_alone(split: training.Split) -> None:
    state, threads = torch.get_rng_state(), torch.get_num_threads()
    training.train_side_by_side(split, epochs=1, seed=5)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.get_num_threads() == threads


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_loss_alone_is_checked_against_float64(case: Case) -> None:
    result = alone.compare_losses(case, CPU, seed=3, budget=0.01)
    assert result.rounds >= 5
    ulp = torch.finfo(case.dtype).eps
    for measured in (result.pytorch, result.fastloss):
        assert measured.accuracy == pytest.approx(result.accuracy, abs=1e-7)
        assert 0 < measured.errors.gradient_norm < 4 * ulp
        assert measured.errors.loss < 4 * ulp
    assert result.fastloss.errors.gradient_norm <= result.pytorch.errors.gradient_norm + ulp / 8
    assert 0.2 < result.accuracy < 0.9  # there are right rows and wrong ones


def test_the_reference_finds_a_wrong_gradient() -> None:
    made = inputs.loss_inputs(*CASES[0], CPU, seed=0)
    right = reference.operation(PYTORCH, "forward+backward")(*made)
    wrong = right._replace(loss=2 * right.loss, gradients=(2 * right.gradients[0],))
    errors = reference.LossReference(made).errors(right, wrong)
    assert max(errors[0].loss, errors[0].gradient_norm) < 1e-5
    assert (errors[1].loss, errors[1].gradient_norm) == pytest.approx((1, 1), abs=1e-5)


def test_logits_are_random_and_follow_the_seed() -> None:
    first, target = inputs.loss_inputs(*CASES[0], CPU, seed=0)
    again, _ = inputs.loss_inputs(*CASES[0], CPU, seed=0)
    other, _ = inputs.loss_inputs(*CASES[0], CPU, seed=1)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert first.detach().std() == pytest.approx(inputs.SPREAD, rel=0.1)
    assert target.unique().numel() > 32


def test_the_text_is_pythons_own_source() -> None:
    tokens = language_model.source_tokens(CPU)
    text = b"".join(bytes(divmod(token, 256)) for token in tokens[:20000].tolist())
    assert (Path(os.__file__).parent / "__future__.py").read_bytes()[:1000] in text
    assert 0 <= tokens.min() < tokens.max() < language_model.CLASSES


@pytest.mark.slow
def test_the_language_model_learns_and_needs_no_logits() -> None:
    shares: list[float] = []
    size = SMALL._replace(steps=5)
    result = language_model.train_language_model(CPU, size=size, seed=1, progress=shares.append)
    logits = size.rows * language_model.CLASSES * 4
    assert shares == [0.2, 0.4, 0.6, 0.8, 1.0]
    assert largest_difference(result.pytorch, result.fastloss) < 1e-4
    for side in (result.pytorch, result.fastloss):
        assert len(side.losses) == len(side.seconds) == 5
        assert side.losses[0] == pytest.approx(math.log(language_model.CLASSES), abs=0.1)
        assert side.losses[-1] < side.losses[0]
    assert result.pytorch.peak_bytes > 2 * logits
    assert result.fastloss.peak_bytes < result.pytorch.peak_bytes - logits
    assert result.saved_bytes == result.pytorch.peak_bytes - result.fastloss.peak_bytes


def test_the_same_seed_gives_the_same_language_model() -> None:
    state = torch.get_rng_state()
    size = language_model.Size(1, 8, 4, 2)
    first, again, other = (language_model.train_language_model(CPU, size=size, seed=s) for s in (3, 3, 4))
    assert first.fastloss.losses == again.fastloss.losses
    assert first.fastloss.losses != other.fastloss.losses
    assert torch.equal(torch.get_rng_state(), state)


def test_the_optimizers_tensors_are_a_resnet50s() -> None:
    shapes = inputs.resnet50_shapes()
    assert len(shapes) == 161
    assert sum(torch.Size(shape).numel() for shape in shapes) == 25_557_032  # torchvision's resnet50
    assert len(inputs.resnet50_shapes(8)) == 161


def test_the_optimizers_width_shrinks_with_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    for free, width in ((1 << 40, 64), (1 << 30, 32), (0, alone.NARROWEST)):
        monkeypatch.setattr(machine, "free_bytes", lambda device, free=free: free)
        assert alone.width_that_fits(CPU) == width


@pytest.mark.slow
def test_the_optimizers_step_is_checked_against_float64() -> None:
    shares: list[float] = []
    result = alone.compare_steps(CPU, width=8, budget=1e-9, progress=shares.append)
    assert (result.tensors, result.rounds, shares[-1]) == (161, 5, 1.0)
    assert [each.clipped for each in result.compared] == [False, False, True, True]
    for each in result.compared:
        assert min(each.seconds) > 0
        assert 0 < max(each.errors) < torch.finfo(torch.float32).eps


def test_the_reference_of_the_optimizer_finds_a_wrong_step(monkeypatch: pytest.MonkeyPatch) -> None:
    shapes = [(100, 100), (8,)]  # norm 5
    right = alone._errors(shapes, CPU)
    assert max(right) < torch.finfo(torch.float32).eps
    monkeypatch.setattr(fastloss.SGD, "_max_norm", lambda self: None)  # clips no more
    wrong = alone._errors(shapes, CPU)
    names = [(name, clipped) for name, clipped, _ in alone._optimizers(CPU)]
    ours, ours_clipped = names.index(("fastloss", False)), names.index(("fastloss", True))
    assert wrong[ours_clipped] > 100 * right[ours_clipped]
    assert wrong[ours] == right[ours]


def test_cases_shrink_with_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    row = 128256 * 4
    plenty, little = 1 << 40, 2 * alone.LOGITS_COPIES * 100 * row
    for free, tokens in ((plenty, 512), (little, 64), (0, alone.FEWEST_TOKENS)):
        monkeypatch.setattr(machine, "free_bytes", lambda device, free=free: free)
        cases = {(case.classes, case.dtype): case.tokens for case in alone.cases_for(CPU)}
        assert cases[128256, torch.float32] == tokens


def test_peak_bytes_is_what_is_held_at_one_time() -> None:
    size = 1_000_000

    def one_after_the_other() -> None:
        torch.empty(size, dtype=torch.uint8)
        torch.empty(size, dtype=torch.uint8)

    def both() -> object:
        return torch.empty(size, dtype=torch.uint8), torch.empty(size, dtype=torch.uint8)

    assert machine.peak_bytes(one_after_the_other, CPU) == size
    assert machine.peak_bytes(both, CPU) == 2 * size
    assert machine.peak_bytes(lambda: None, CPU) == 0


def test_peak_bytes_of_a_known_step() -> None:
    """PyTorch's own loss holds its log-softmax, the gradient of that and the gradient: thrice the logits."""
    logits = torch.randn(256, 2048, requires_grad=True)
    target = torch.randint(2048, (256,))
    step = partial(reference.operation(PYTORCH, "forward+backward"), logits, target)
    assert machine.peak_bytes(step, CPU) == pytest.approx(3 * logits.nbytes, rel=0.01)


def test_interleaved_goes_forth_and_back() -> None:
    order: list[str] = []
    shares: list[float] = []
    steps = [lambda: order.append("a"), lambda: order.append("b")]
    times = clock.in_turns(steps, partial(clock.seconds, device=CPU), budget=1e-9, least=3, progress=shares.append)
    assert "".join(order) == "abbaab"
    assert [len(each) for each in times] == [3, 3]
    assert all(second > 0 for each in times for second in each)
    assert shares[-1] == 1.0


def test_other_programs_take_a_share() -> None:
    others = machine.OtherPrograms()
    torch.randn(512, 512).softmax(1)
    assert 0 <= others.share() <= 1


@pytest.mark.parametrize(
    ("pytorch", "fastloss", "words"),
    [
        (3.0, 1.0, f"3.0{TIMES} faster"),
        (1.0, 2.5, f"2.5{TIMES} slower"),
        (1.02, 1.0, "the same"),
        (1.0, 1.04, "the same"),
    ],
)
def test_the_picture_names_the_faster_side(pytorch: float, fastloss: float, words: str) -> None:
    from fastloss.demo import report

    assert report._verdict(pytorch, fastloss, better="faster", worse="slower")[0] == words
