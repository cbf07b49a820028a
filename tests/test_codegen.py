"""What the compiler makes of the kernels, without a GPU: a subset of ``python -m benchmarks.codegen``.

The subset: for sm_90 every kernel in every form, in bfloat16, at the shapes of ``--quick``; for the other targets the
loss with an accuracy there, and SGD. It takes some minutes; all of it takes hours of one core.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from fastloss.backends import choice

ROOT = Path(__file__).resolve().parent.parent

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        choice.triton_version() is None or not (ROOT / "benchmarks" / "codegen.py").exists(),
        reason="needs Triton and the repository's benchmarks",
    ),
]


def run(*command: str) -> subprocess.CompletedProcess[str]:
    """In a process of its own: here Triton interprets."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), environment.get("PYTHONPATH", "")])
    command = (sys.executable, *command)
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)


def codegen(*arguments: str) -> subprocess.CompletedProcess[str]:
    return run("-m", "benchmarks.codegen", *arguments)


LOSS_FORMS = ["plain", "accuracy", "weight", "none", "smoothing", "softcap", "chunk", "rescale"]
FORMS = [*LOSS_FORMS, "soft", "statistics", "shard"]


@pytest.mark.parametrize("form", FORMS)
def test_every_form_on_sm_90(form: str) -> None:
    """Nothing spills, aligned accesses are wide, and budgets are kept; SGD is below."""
    done = codegen("--target", "sm_90", "--quick", "--only", f"bfloat16 {form}")
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_forms_are_all_of_them() -> None:
    program = (
        "from benchmarks import codegen; codegen.pretend_to_be_an_h100(); "
        "print(*{launch.label.split()[2].split('-')[0].split('+')[0] for launch in codegen.chosen(True) "
        "if not launch.label.startswith('sgd')})"
    )
    done = run("-c", program)
    assert done.returncode == 0, done.stderr
    assert {*done.stdout.split()} == {*FORMS}, done.stdout


@pytest.mark.parametrize("target", ["sm_80", "sm_100", "gfx942"])
def test_nothing_spills_and_hot_accesses_are_wide(target: str) -> None:
    done = codegen("--target", target, "--quick", "--only", "bfloat16 accuracy forward")
    assert done.returncode == 0, done.stdout + done.stderr
    lines = [line for line in done.stdout.splitlines() if "forward+gradient" in line and "weigh" not in line]
    assert len(lines) >= 4, done.stdout
    for line in lines:
        if "x1000 " in line or "x32000" in line or "x128256" in line:
            wide = ("LDG.128", "STG.128") if target.startswith("sm") else ("LDG.dwordx4", "STG.dwordx4")
            assert all(access in line for access in wide), line


BUDGETED = ["8192x32000 bfloat16 plain", "8192x32000 bfloat16 accuracy", "4096x128256 bfloat16 accuracy", "sgd "]


@pytest.mark.parametrize("label", BUDGETED)
def test_hot_loops_are_within_their_budgets(label: str) -> None:
    done = codegen("--target", "sm_90", "--only", label)
    assert done.returncode == 0, done.stdout + done.stderr
    loops = [
        line
        for line in done.stdout.splitlines()
        if re.match(r"(forward_loop|forward_tile|step_kernel|squares_kernel) ", line)
    ]
    assert loops
    for line in loops:
        assert re.search(r" \d+\.\d \d\.\d\d +\d+%", line), line  # a hot loop was found in each


@pytest.mark.parametrize("form", ["smoothing+softcap forward", "smoothing+softcap soft forward"])
def test_no_product_is_taken_from_itself(form: str) -> None:
    """The capped logit is a product, t·c; whether it is finite must not hang on how it was rounded."""
    done = codegen("--target", "sm_90", "--quick", "--only", form)
    assert done.returncode == 0, done.stdout + done.stderr
    kernels = {line.split()[0] for line in done.stdout.splitlines() if form in line}
    assert kernels >= (
        {"soft_statistics"} if "soft forward" in form else {"forward_loop", "statistics_loop", "statistics_tile"}
    )


@pytest.mark.parametrize("target", ["sm_80", "sm_100", "gfx942"])
def test_sgd_spills_nowhere(target: str) -> None:
    done = codegen("--target", target, "--only", "sgd ")
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(
    ("kernel", "fault"),
    [
        ("spilling", "spills"),
        ("narrow", "narrow accesses in hot loops"),
        ("narrow_throughout", "32 bytes a thread without 128-bit accesses"),
        ("narrow_tile", "32 bytes a thread without 128-bit accesses"),
        ("costly", "instructions, over 0.5"),
        ("inexact", "8 products taken from themselves"),
        ("costly_tile", "instructions, over 0.5"),
    ],
)
def test_a_bad_kernel_is_caught(kernel: str, fault: str, tmp_path: Path) -> None:
    program = tmp_path / "bad_kernels.py"
    program.write_text(BAD_KERNELS, encoding="utf-8")
    done = run(str(program), kernel)
    assert fault in done.stdout, done.stdout + done.stderr


def test_products_taken_from_themselves_are_found_two_at_a_time() -> None:
    """As sm_100 has them; put together of two registers, and taken apart."""
    program = """if True:
        from benchmarks.codegen import rounding_errors
        packed = "mul.f32x2 %rd1, %rd2, %rd3; neg.f32x2 %rd4, %rd1; fma.rn.f32x2 %rd5, %rd2, %rd3, %rd4;"
        print(rounding_errors(packed))
        print(rounding_errors(packed.replace("x2", "")))
        print(rounding_errors(
            "mov.b64 %rd1, {%r1, %r2}; mov.b64 %rd2, {%r3, %r4}; mul.f32x2 %rd3, %rd1, %rd2;"
            "mov.b64 {%r5, %r6}, %rd3; neg.f32 %r7, %r6; fma.rn.f32 %r8, %r2, %r4, %r7;"
            "neg.f32 %r9, %r5; fma.rn.f32 %r10, %r2, %r4, %r9;"
        ))
        print(rounding_errors("mul.f32x2 %rd1, %rd2, %rd3; fma.rn.f32x2 %rd5, %rd2, %rd4, %rd1;"))
    """
    done = run("-c", program)
    assert done.stdout.splitlines() == ["['%rd5.0', '%rd5.1']", "['%rd5']", "['%r8']", "[]"], (
        done.stdout + done.stderr
    )


def test_logits_that_begin_elsewhere_are_compiled_too() -> None:
    """Triton compiles other code for them, and what is compiled once stands for its like alone."""
    program = """if True:
        import torch
        from benchmarks import codegen
        codegen.pretend_to_be_an_h100()
        calls = [call for offset in (0, 1) for call in codegen.cases([(4096, 1024)], ["bfloat16"], offset=offset)]
        launches = []
        for label, call in calls:
            if label.endswith("bfloat16 none+accuracy backward"):
                with codegen.recorded(launches, label):
                    call()
        print(len(launches), *[launch.label.split()[0] for launch, _ in codegen.distinct(launches, ["sm_90"])])

        def moved(argument):  # to an odd address, and nothing else
            return argument.new_empty(argument.numel() + 1)[1:] if isinstance(argument, torch.Tensor) else argument

        first = launches[0]
        given, odd = first.arguments, moved(torch.ones(8))
        kinds = given, tuple(map(moved, given)), given, (*given, (1.0,)), (*given, (odd,))
        alike = [codegen.Launch(first.kernel, each, first.options, first.label) for each in kinds]
        print(len(codegen.distinct(alike, ["sm_90"])))
    """
    done = run("-c", program)
    assert done.stdout.split()[0] == "4", done.stdout + done.stderr
    assert {*done.stdout.split()[1:-1]} == {"4096x1024", "4096x1024@1"}, done.stdout
    assert done.stdout.split()[-1] == "4", done.stdout  # of five, two are the same


@pytest.mark.parametrize("kernel", ["good", "good_tile"])
def test_a_good_kernel_is_not(kernel: str, tmp_path: Path) -> None:
    program = tmp_path / "bad_kernels.py"
    program.write_text(BAD_KERNELS, encoding="utf-8")
    done = run(str(program), kernel)
    assert done.returncode == 0, done.stderr
    assert "LDG.128" in done.stdout
    assert "FAULT" not in done.stdout


def test_a_budget_without_a_loop_is_a_fault(tmp_path: Path) -> None:
    """It would be kept whatever the kernel did."""
    program = tmp_path / "no_loop.py"
    program.write_text(
        "import sys\nfrom benchmarks import codegen\n"
        "label = '4096x1000 bfloat16 shard ranks'  # whose programs take one tile each\n"
        "codegen.BUDGETS[label] = codegen.Budget(instructions=99)\n"
        "sys.exit(codegen.main(['--target', 'sm_90', '--only', label]))\n",
        encoding="utf-8",
    )
    done = run(str(program))
    assert done.returncode == 1, done.stdout + done.stderr
    assert "FAULT: a budget, and no hot loop found; sm_90 4096x1000 bfloat16 shard ranks" in done.stdout


BAD_KERNELS = """
import sys

import torch
import triton
import triton.language as tl

from benchmarks import codegen


@triton.jit
def spilling(x_ptr, n, COLS: tl.constexpr):  # a row of 131072 numbers by 128 threads: 1024 registers each
    x = tl.load(x_ptr + tl.arange(0, COLS))
    x = x - tl.max(x, axis=0)
    tl.store(x_ptr + tl.arange(0, COLS), tl.exp2(x) / tl.sum(tl.exp2(x), axis=0))


@triton.jit
def narrow(x_ptr, n, BLOCK: tl.constexpr):  # of the stores every second element is left out
    lane = tl.arange(0, BLOCK)
    for start in tl.range(0, n, BLOCK):
        x = tl.load(x_ptr + start + lane)
        tl.store(x_ptr + start + 2 * lane, x * 2.0)


@triton.jit
def narrow_throughout(x_ptr, n, BLOCK: tl.constexpr):  # and of the loads
    lane = tl.arange(0, BLOCK)
    for start in tl.range(0, n, BLOCK):
        x = tl.load(x_ptr + start + 2 * lane)
        tl.store(x_ptr + start + 2 * lane, x * 2.0)


@triton.jit
def narrow_tile(x_ptr, n, COLS: tl.constexpr, LOOPED: tl.constexpr, VEC: tl.constexpr):
    lane = tl.arange(0, COLS)
    for row in tl.range(tl.program_id(0), n, tl.num_programs(0)):
        x = tl.load(x_ptr + row * 2 * COLS + 2 * lane)
        tl.store(x_ptr + row, tl.sum(x, axis=0))


@triton.jit
def costly(x_ptr, n, BLOCK: tl.constexpr):
    lane = tl.arange(0, BLOCK)
    for start in tl.range(0, n, BLOCK):
        x = tl.load(x_ptr + start + lane)
        for _ in tl.static_range(8):
            x = x * x + 1.0
        tl.store(x_ptr + start + lane, x)


@triton.jit
def inexact(x_ptr, n, BLOCK: tl.constexpr):  # 0 for most finite numbers too; 8 of them a thread
    x = tl.load(x_ptr + tl.arange(0, BLOCK)) * 3.0
    tl.store(x_ptr + tl.arange(0, BLOCK), tl.where(x - x == 0.0, x, 0.0))


@triton.jit
def costly_tile(x_ptr, n, COLS: tl.constexpr, LOOPED: tl.constexpr, VEC: tl.constexpr):
    lane = tl.arange(0, COLS)
    for row in tl.range(tl.program_id(0), n, tl.num_programs(0)):
        x = tl.load(x_ptr + row * COLS + lane)
        tl.store(x_ptr + row * COLS + lane, x / tl.sum(x, axis=0))


good, good_tile = costly, costly_tile

name = sys.argv[1]
options = {"num_warps": 4}
if name.endswith("tile") or name == "spilling":
    options |= {"COLS": {"spilling": 131072}.get(name, 1024)}
    options |= {} if name == "spilling" else {"LOOPED": False, "VEC": 4}
else:
    options |= {"BLOCK": 1024}
launch = codegen.Launch(globals()[name], (torch.empty(1 << 20), 1 << 20), options, f"bad float32 {name}")
most = 99 if name.startswith("good") else 0.5
codegen.BUDGETS[launch.label] = codegen.Budget(instructions=most)
print(codegen._line(codegen.examine(launch, "sm_90", codegen.TARGETS["sm_90"])))
"""


EVERY_TILE = """
import random

from benchmarks import codegen

codegen.pretend_to_be_an_h100()
compiled = {codegen.form_and_tile(launch) for launch in codegen.chosen(quick=False)}
shapes = []
for _ in range(100):
    classes = int(2 ** random.uniform(0, 18.2))
    step = random.choice([1, 2, 4, 8])
    classes = -(-classes // step) * step
    rows = max(1, min(int(2 ** random.uniform(0, 28)), (1 << 31) // classes))
    shapes.append((rows, classes))
shapes += [(random.randint(1, 64), random.randint(1, 3000), random.randint(2, 5000)) for _ in range(10)]
for label, call in codegen.cases(shapes):
    launches = []
    with codegen.recorded(launches, label):
        call()
    for launch in launches:
        if codegen.form_and_tile(launch) not in compiled:
            print(label, codegen.form_and_tile(launch))
print(len(compiled), "tiles and forms")
"""


def test_every_tile_that_can_be_chosen_is_compiled(tmp_path: Path) -> None:
    """The list of shapes, against shapes that nobody chose."""
    program = tmp_path / "every_tile.py"
    program.write_text(EVERY_TILE, encoding="utf-8")
    done = run(str(program))
    assert done.returncode == 0, done.stderr
    assert re.fullmatch(r"\d{4,} tiles and forms\n", done.stdout), done.stdout


def test_a_single_row_compiles() -> None:
    """Triton makes constants of arguments that are 1."""
    done = codegen("--target", "sm_90", "--only", "1x1000 bfloat16")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "none+accuracy forward" in done.stdout


def test_help_explains_every_column() -> None:
    printed = codegen("--target", "sm_90", "--quick", "--only", "sgd float32 momentum step").stdout
    kernel, target, *names = printed.splitlines()[0].replace("made for", "made-for").replace(";", "").split()
    assert (kernel, target) == ("kernel", "target")
    legend = codegen("--help").stdout.partition("columns:\n")[2].splitlines()
    assert [line.replace("made for", "made-for").split()[0] for line in legend] == names
    assert all(len(line.split()) > 2 for line in legend)


def test_it_refuses_the_interpreter() -> None:
    command = [sys.executable, "-m", "benchmarks.codegen"]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "TRITON_INTERPRET" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "words"),
    [(["--only", "no such thing"], "no label contains it"), (["--jobs", "0"], "--jobs is 0; expected 1 or more")],
)
def test_what_it_refuses(arguments: list[str], words: str) -> None:
    done = codegen(*arguments)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith("benchmarks.codegen: ")
    assert words in line
