"""Where the parts lie, and who may import whom.

``kernels/`` stands at the repository's top and is installed as ``fastloss.kernels``. It must be found from a
clone whose package is also installed, from an editable install and from a wheel, and never be a top-level
``kernels``.
"""

from __future__ import annotations

import ast
import importlib
import importlib.util
import inspect
import json
import os
import re
import shutil
import subprocess
import sys
import typing
import venv
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from fastloss.backends.contract import Backend

ROOT = Path(__file__).resolve().parents[1]
BACKEND_FUNCTIONS = sorted(name for name in vars(Backend) if not name.startswith("_"))

MODULE_NAME = re.compile(r"fastloss(\.\w+)+")

needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="fastloss.kernels needs Triton")


# ----------------------------------------------------------------------------- clone, editable install, wheel


@pytest.fixture(scope="session")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the source tree: pip writes build/ and *.egg-info/ into the one that it builds."""
    clone = tmp_path_factory.mktemp("clone")
    for name in ("LICENSE", "README.md", "pyproject.toml"):
        shutil.copy(ROOT / name, clone)
    unwanted = shutil.ignore_patterns("__pycache__", "results")
    for name in ("fastloss", "kernels", "tests", "benchmarks"):
        if (ROOT / name).is_dir():  # benchmarks/ is not in an sdist
            shutil.copytree(ROOT / name, clone / name, ignore=unwanted)
    return clone


@pytest.fixture(scope="session")
def wheel(clone: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    pip(sys.executable, "wheel", "--no-build-isolation", "--wheel-dir", folder, clone)
    (wheel,) = folder.glob("*.whl")
    return wheel


@pytest.fixture(scope="session")
def installed_python(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Python with fastloss's wheel, which is what a plain ``pip install .`` builds and installs."""
    python = new_environment(tmp_path_factory.mktemp("installed"))
    pip(python, "install", wheel)
    return python


@pytest.fixture(scope="session")
def editable_python(clone: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Python with an editable install of the clone."""
    python = new_environment(tmp_path_factory.mktemp("editable"))
    pip(python, "install", "--no-build-isolation", "--editable", clone)
    return python


@pytest.mark.slow
@needs_triton
def test_clone_finds_its_kernels_beside_an_installed_package(clone: Path, installed_python: Path) -> None:
    # Started in the clone's root, Python finds the source folder fastloss/ before the installed package.
    found = imported_from(installed_python, cwd=clone)
    assert found["fastloss"] == str(clone / "fastloss" / "__init__.py")
    assert found["fastloss.kernels"] == str(clone / "kernels" / "__init__.py")


@pytest.mark.slow
@needs_triton
@pytest.mark.parametrize("start", ["root", "elsewhere"])
def test_editable_install_finds_its_kernels(start: str, clone: Path, editable_python: Path, tmp_path: Path) -> None:
    found = imported_from(editable_python, cwd=clone if start == "root" else tmp_path)
    assert found["fastloss"] == str(clone / "fastloss" / "__init__.py")
    assert found["fastloss.kernels"] == str(clone / "kernels" / "__init__.py")
    if start == "elsewhere":
        assert found["kernels"] == "ModuleNotFoundError"


@pytest.mark.slow
@needs_triton
def test_wheel_holds_its_kernels_and_no_top_level_kernels(installed_python: Path, tmp_path: Path) -> None:
    found = imported_from(installed_python, cwd=tmp_path)
    package = Path(found["fastloss"]).parent
    assert package.is_relative_to(installed_python.parents[1])
    assert found["fastloss.kernels"] == str(package / "kernels" / "__init__.py")
    assert found["kernels"] == "ModuleNotFoundError"


@pytest.mark.slow
def test_wheel_holds_every_module_and_nothing_else(clone: Path, wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        (license_file,) = (name for name in names if name.endswith(".dist-info/licenses/LICENSE"))
        assert archive.read(license_file) == (ROOT / "LICENSE").read_bytes()
    modules = {path.relative_to(clone) for path in (clone / "fastloss").rglob("*.py")}
    modules |= {"fastloss" / path.relative_to(clone) for path in (clone / "kernels").rglob("*.py")}
    assert {Path(name) for name in names if name.endswith(".py")} == modules
    assert "fastloss/py.typed" in names
    assert {name.split("/")[0] for name in names} == {"fastloss", license_file.split("/")[0]}


@pytest.mark.slow
def test_the_version_is_said_in_one_place(wheel: Path) -> None:
    """As a literal, so that building needs no torch."""
    (line,) = (ROOT / "fastloss" / "__init__.py").read_text(encoding="utf-8").split("__version__ = ")[1:]
    version = ast.literal_eval(line.splitlines()[0])
    assert wheel.name.startswith(f"fastloss-{version}-")
    assert version not in (ROOT / "pyproject.toml").read_text(encoding="utf-8")


def new_environment(folder: Path) -> Path:
    """A new virtual environment that borrows this one's packages; its Python."""
    venv.create(folder, symlinks=os.name != "nt")
    python = folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    # The folder of torch and its requirements, and that of setuptools to build with. Named in a .pth file, it
    # joins sys.path without its own .pth files, so without an editable fastloss.
    lent = {str(Path(package_folder(name)).parent) for name in ("torch", "setuptools")}
    site_packages = run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip()
    Path(site_packages, "borrowed.pth").write_text("\n".join(sorted(lent)), encoding="utf-8")
    return python


def package_folder(name: str) -> str:
    spec = importlib.util.find_spec(name)
    assert spec is not None, f"this environment has no {name}"
    return (spec.submodule_search_locations or [""])[0]


def pip(python: str | Path, command: str, *arguments: str | Path) -> None:
    """pip for ``python``, without a network; what is borrowed there does not count as installed."""
    if command == "install":
        arguments = ("--ignore-installed", "--no-compile", *arguments)
    run(sys.executable, "-m", "pip", "--python", python, command, "--no-index", "--no-deps", *arguments)


def imported_from(python: Path, cwd: Path) -> dict[str, str]:
    """The file of each module that a Python started in ``cwd`` imports, or the name of the error it gets."""
    program = """
        import importlib, json
        found = {}
        for name in ("fastloss", "fastloss.kernels", "kernels"):
            try:
                found[name] = importlib.import_module(name).__file__
            except ImportError as error:
                found[name] = type(error).__name__
        print(json.dumps(found))
    """
    return json.loads(run(python, "-c", inspect.cleandoc(program), cwd=cwd))


def run(*command: str | Path, cwd: Path | None = None) -> str:
    """The output of a command that must succeed, run without the caller's settings for what it tests."""
    dropped = ("FASTLOSS_", "PIP_", "PYTHON", "TRITON_INTERPRET")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(dropped)}
    result = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, f"{command}\n{result.stdout}\n{result.stderr}"
    return result.stdout


# --------------------------------------------------------------------------------------------- without Triton

LOSS_AGREES_WITH_TORCH = """
import torch, fastloss

logits = torch.randn(64, 1000, generator=torch.Generator().manual_seed(0)).requires_grad_()
target = torch.arange(64)
with fastloss.use_backend({backend!r}):
    loss = fastloss.cross_entropy(logits, target)
    (gradient,) = torch.autograd.grad(loss, logits)
expected = torch.nn.functional.cross_entropy(logits, target)
torch.testing.assert_close(loss, expected)
torch.testing.assert_close(gradient, torch.autograd.grad(expected, logits)[0])
"""


@pytest.mark.slow
def test_fastloss_on_a_cpu_does_not_import_triton() -> None:
    program = "import sys, torch\nbefore = 'triton' in sys.modules\n"
    program += LOSS_AGREES_WITH_TORCH.format(backend="auto")
    program += "assert before or 'triton' not in sys.modules"
    run(sys.executable, "-c", program, cwd=ROOT)


@pytest.mark.slow
@pytest.mark.parametrize("triton", ["absent", "broken"])
def test_fastloss_works_without_triton(triton: str, tmp_path: Path) -> None:
    if triton == "absent":
        program = "import sys\nsys.modules['triton'] = None\n"  # as the import system marks what is not there
    else:
        broken = "raise ImportError('libtriton.so is broken')"
        (tmp_path / "triton.py").write_text(broken, encoding="utf-8")
        program = f"import sys\nsys.path.insert(0, {str(tmp_path)!r})\n"
    for backend in ("auto", "eager"):
        program += LOSS_AGREES_WITH_TORCH.format(backend=backend)
    program += inspect.cleandoc("""
        print(fastloss.backends.choice.reason(torch.device("cuda")))
        try:
            with fastloss.use_backend("triton"):
                fastloss.cross_entropy(logits, target)
        except RuntimeError as error:
            print(error)
    """)
    why_eager, error = run(sys.executable, "-c", program, cwd=ROOT).splitlines()
    assert why_eager == "eager: Triton can't be imported (pip install triton)"
    assert error.endswith("Triton can't be imported (pip install triton)")


# ------------------------------------------------------------------------------------------- who imports whom

# Imports run down this list: a room (a folder of the package, or a file beside them) imports only rooms below it.
ROOMS = ("__main__", "bench", "demo", "measuring", "__init__", "faces", "metrics", "linear", "loss")
ROOMS += ("optim", "checks", "ranks", "kernels", "backends")
# The one exception: choice.py imports a backend by its name when a tensor needs it.
UPWARDS = {"fastloss/backends/choice.py imports fastloss.kernels"}
# The same for the files of a room. Kernels have no order.
FILES = {
    "faces": ("lazy", "patch", "modules"),
    "bench": ("report", "measure", "workloads"),
    "demo": ("report", "language_model", "alone", "training"),
    "measuring": ("sgd", "reference", "contenders", "inputs", "clock", "machine", "info", "style"),
    "loss": ("statistics", "functional", "routes", "sharded", "row_numbers", "compiled", "autograd", "composite"),
    "linear": (
        *("statistics", "token_loss", "functional", "topk", "kl_div", "sharded", "compiled", "autograd"),
        *("row_numbers", "chunks", "arguments"),
    ),
    "metrics": ("accuracy", "standalone"),
    "optim": ("sgd", "repeat", "step_plan", "shards", "plain", "checkpoint"),
    "ranks": ("placements", "collectives"),
    "backends": (
        *("short_road", "choice", "recorder", "eager", "view", "contract", "batch", "memory", "torch_private"),
    ),
}


def test_triton_is_imported_by_choice_alone_and_only_when_asked_for() -> None:
    importers = {
        path.relative_to(ROOT).as_posix()
        for path in source_files("fastloss")
        if any(name.split(".")[0] == "triton" for name in imports(path))
    }
    assert importers == {"fastloss/backends/choice.py"}
    # That it waits until it is asked for, the tests above show; no kernel is written there either.
    assert not [path for path in source_files("fastloss") if "@triton" in path.read_text(encoding="utf-8")]


@pytest.mark.parametrize("folder", ["fastloss/backends/eager", "kernels"])
def test_a_backend_knows_only_the_contract(folder: str) -> None:
    own = "fastloss." + ".".join(Path(folder).parts).removeprefix("fastloss.")
    for path in source_files(folder):
        allowed = ("fastloss.backends.contract", "fastloss.backends.torch_private", own)
        if path.name == "launch.py":
            allowed += ("fastloss.backends.recorder", "fastloss.backends.short_road")
        outside = {name for name in package_imports(path) if not name.startswith(allowed)}
        assert not outside, f"{path.relative_to(ROOT)} imports {sorted(outside)}"


def test_nothing_imports_upwards() -> None:
    upwards = set()
    for path in [*source_files("fastloss"), *source_files("kernels")]:
        room, file = place(path)
        for name in package_imports(path):
            other, other_file = [*name.split("."), "__init__", "__init__"][1:3]
            if other not in ROOMS:  # a public name of fastloss/__init__.py
                other, other_file = "__init__", "__init__"
            if room != other:
                rises = ROOMS.index(room) > ROOMS.index(other)
            else:
                order = FILES.get(room, ())
                rises = file in order and other_file in order and order.index(file) > order.index(other_file)
            if rises:
                upwards.add(f"{path.relative_to(ROOT).as_posix()} imports {name}")
    assert upwards == UPWARDS


def test_every_file_has_its_place() -> None:
    places = {place(path) for path in [*source_files("fastloss"), *source_files("kernels")]}
    assert {room for room, _ in places} == set(ROOMS)
    for room, files in FILES.items():
        assert {file for other, file in places if other == room} - {"__init__"} == set(files), room


def place(path: Path) -> tuple[str, str]:
    """The room that a file belongs to, and its name there: that of its folder, for a file in a folder of the room."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    parts = parts[1:] if parts[0] == "fastloss" else parts
    return (parts[0], parts[1]) if len(parts) > 1 else (parts[0], "__init__")


def package_imports(path: Path) -> set[str]:
    return {name for name in imports(path) if name.split(".")[0] == "fastloss" and name != "fastloss"}


def source_files(folder: str) -> list[Path]:
    files = sorted((ROOT / folder).rglob("*.py"))
    assert files, folder
    return files


def imports(path: Path) -> Iterator[str]:
    """Yield the full names of what a file imports, in functions too: of the modules, and of what is taken from them.

    A string that begins with ``fastloss.`` is taken for the name of a module that is imported by it.
    """
    parts = path.relative_to(ROOT).parent.parts
    package = list(parts if parts[0] == "fastloss" else ("fastloss", *parts))
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            yield module
            yield from (f"{module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith(("import_module", "__import__")):
            constants = (part.value for part in ast.walk(node) if isinstance(part, ast.Constant))
            yield from (value for value in constants if isinstance(value, str))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and MODULE_NAME.fullmatch(node.value):
            yield node.value


# --------------------------------------------------------------------------------- two backends, one contract


@pytest.mark.parametrize("backend", ["fastloss.backends.eager", pytest.param("fastloss.kernels", marks=needs_triton)])
@pytest.mark.parametrize("name", BACKEND_FUNCTIONS)
def test_backend_offers_the_contract_signature(backend: str, name: str) -> None:
    offered = getattr(importlib.import_module(backend), name)
    promised = getattr(Backend, name)
    assert parameters(offered) == parameters(promised)[1:]  # without self
    assert typing.get_type_hints(offered) == typing.get_type_hints(promised)


@pytest.mark.parametrize("backend", ["fastloss.backends.eager", pytest.param("fastloss.kernels", marks=needs_triton)])
def test_backend_offers_the_contract_functions_and_no_other(backend: str) -> None:
    offered = vars(importlib.import_module(backend)).items()
    assert sorted(name for name, value in offered if callable(value)) == BACKEND_FUNCTIONS


def parameters(function: Callable[..., object]) -> list[tuple[str, str, object]]:
    """Names, kinds and defaults; annotations may be strings here and objects there."""
    return [(p.name, p.kind.name, p.default) for p in inspect.signature(function).parameters.values()]
