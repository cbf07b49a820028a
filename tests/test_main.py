"""``python -m fastloss``: its commands, its errors, and ``info``, each in an interpreter of its own."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest
import torch

import fastloss
from fastloss import demo
from fastloss.__main__ import main
from fastloss.backends import choice
from fastloss.measuring import info

WITHOUT = "import sys; sys.modules.update(dict.fromkeys({modules!r})); "
MAIN = "from fastloss.__main__ import main; sys.exit(main({arguments!r}))"


def run_without(modules: list[str], *arguments: str) -> subprocess.CompletedProcess[str]:
    """The command line, in a Python that can't import ``modules``."""
    code = (WITHOUT + MAIN).format(modules=modules, arguments=list(arguments))
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, encoding="utf-8")


def test_no_argument_prints_the_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    out = capsys.readouterr().out
    assert out.startswith("usage: python -m fastloss")
    assert "demo" in out
    assert "info" in out


@pytest.mark.slow
def test_runs_as_a_module() -> None:
    done = subprocess.run([sys.executable, "-m", "fastloss", "--version"], capture_output=True, text=True, check=True)
    assert done.stdout == f"fastloss {fastloss.__version__}\n"


def test_unknown_command_lists_the_known_ones(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        main(["dance"])
    assert exit_.value.code == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert "dance" in last
    assert "demo" in last
    assert "info" in last


@pytest.mark.parametrize(
    ("output", "complaint"), [("picture.svg", "does not end in .png"), ("no/such/picture.png", "no folder")]
)
def test_a_picture_that_cannot_be_written_is_refused_before_the_work(
    output: str, complaint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as exit_:
        main(["demo", "--output", output])
    assert exit_.value.code == 2
    assert complaint in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.slow
def test_demo_without_its_extras_says_what_to_install() -> None:
    done = run_without(["rich", "matplotlib", "psutil", "sklearn"], "demo")
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr == (
        'fastloss: the demo needs matplotlib, psutil, rich, scikit-learn: pip install "fastloss[demo]"\n'
    )


@pytest.mark.slow
@pytest.mark.skipif(bool(demo.missing_extras()), reason='needs pip install "fastloss[demo]"')
def test_demo_without_one_package_names_that_one() -> None:
    done = run_without(["sklearn"], "demo")
    assert done.returncode == 2
    assert done.stderr == 'fastloss: the demo needs scikit-learn: pip install "fastloss[demo]"\n'


@pytest.mark.slow
@pytest.mark.parametrize("without", [[], ["rich", "matplotlib", "psutil", "sklearn"]])
def test_info_shows_every_fact(without: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "250")
    done = run_without(without, "info")
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    for name, value in info.facts():
        assert any(line.startswith(name) and value in line for line in done.stdout.splitlines()), name


def test_info_knows_the_versions_and_the_backend() -> None:
    facts = dict(info.facts())
    assert facts["fastloss"] == fastloss.__version__
    assert facts["Python"].startswith(platform.python_version())
    assert facts["torch"] == torch.__version__
    assert facts["Triton"]
    assert facts["backend on the CPU"] == choice.reason(torch.device("cpu"))
    assert f"{torch.get_num_threads()} threads" in facts["CPU"]


def test_info_without_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "triton", None)
    monkeypatch.setattr(choice, "triton_version", choice.triton_version.__wrapped__)  # the uncached one
    assert choice.triton_version() is None
    assert dict(info.facts())["Triton"] == "not installed"


def test_info_names_each_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = torch.device("cuda", 1)
    monkeypatch.setattr(info, "_accelerators", lambda: [gpu])
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "A Fast One")
    facts = dict(info.facts())
    assert facts["GPU cuda:1"] == "A Fast One"
    assert facts["backend on cuda:1"] == choice.reason(gpu)


@pytest.mark.parametrize("value", [None, "", "auto"])
def test_an_empty_choice_of_the_backend_is_none(value: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FASTLOSS_BACKEND", raising=False)
    if value is not None:
        monkeypatch.setenv("FASTLOSS_BACKEND", value)
    assert choice.wanted() == "auto"
    assert not choice.is_forced()
    with fastloss.use_backend("eager"):
        assert choice.is_forced()
    monkeypatch.setenv("FASTLOSS_BACKEND", "eager")
    assert choice.is_forced()


def test_info_tells_of_a_wrong_backend_instead_of_failing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTLOSS_BACKEND", "tritonn")
    assert "'tritonn'" in dict(info.facts())["backend on the CPU"]
