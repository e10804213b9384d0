"""The way of a call: few frames and operations down to a kernel, few parameters, and imports that point downwards."""

import ast
import itertools
from pathlib import Path

import pytest
import torch
from dispatch import Operations, frames_at

import mopo_kernels
from mopo_kernels import linear_logprob, mopo_loss, win_rate_from_pairs
from mopo_kernels.backends.native import cpu

PACKAGE = Path(mopo_kernels.__file__).parent
SOURCES = {
    ".".join(("mopo_kernels", *path.relative_to(PACKAGE).with_suffix("").parts)).removesuffix(".__init__"): ast.parse(
        path.read_text()
    )
    for path in sorted(PACKAGE.rglob("*.py"))
}
WINGS = ["backends", "checks", "objective", "head", "logprob", "loss", "measure"]  # each may import what stands before
EXTENSIONS = {"mopo_kernels._cpu", "mopo_kernels._cuda"}
PUBLIC = {*mopo_kernels.__all__, "policy_loss"}
needs_cpu = pytest.mark.skipif(bool(cpu.UNAVAILABLE), reason=cpu.UNAVAILABLE)


def arguments_of_the_loss():
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(8, 32, 64, generator=generator, requires_grad=True)
    weight = torch.randn(1000, 64, generator=generator, requires_grad=True)
    target = torch.randint(0, 1000, (8, 32), generator=generator)
    labels = (win_rate_from_pairs(torch.rand(4, 2, generator=generator)), torch.arange(4).repeat(2))
    return hidden, weight, target, *labels, torch.tensor([1.0, 0.5])


@needs_cpu
def test_a_clone_forward_asks_little_of_torch(monkeypatch):
    monkeypatch.delenv("MOPO_BACKEND", raising=False)
    arguments = arguments_of_the_loss()
    with Operations() as operations:
        mopo_loss(*arguments, tau=0.3, eps=0.01)
    assert len(operations.named("linear_policy_loss")) == 1
    assert len(operations.named("label_statistics")) == 1
    assert len(operations.work) <= 40
    assert len(operations.read_backs) <= 1


@needs_cpu
@pytest.mark.parametrize("what", ["loss", "log-probs"])
def test_few_frames_lead_to_a_kernel(what, monkeypatch):
    monkeypatch.delenv("MOPO_BACKEND", raising=False)
    hidden, weight, target, *labels = arguments_of_the_loss()
    call = {
        "loss": lambda: mopo_loss(hidden, weight, target, *labels, tau=0.3),
        "log-probs": lambda: linear_logprob(hidden, weight, target),
    }[what]
    frames = frames_at(call, "statistics")
    assert frames[-1] == ("native.py", "fold_statistics")
    assert 1 < len(frames) <= 6


# --------------------------------------------------------------------------------------------------------- signatures


def functions(tree, owner=""):
    """(owner, function) of every function and method, those within functions too."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield owner, node
        yield from functions(node, node.name if isinstance(node, ast.ClassDef) else owner)


def parameters(function):
    spread = [x for x in (function.args.vararg, function.args.kwarg) if x is not None]
    named = [*function.args.posonlyargs, *function.args.args, *function.args.kwonlyargs]
    return [x.arg for x in (*named, *spread) if x.arg not in ("self", "cls")]


def is_kernel(function):
    """Of Triton."""
    return any("triton.jit" in ast.unparse(x) or "triton.autotune" in ast.unparse(x) for x in function.decorator_list)


@pytest.mark.parametrize("module", SOURCES)
def test_nothing_private_has_more_than_eight_parameters(module):
    too_many = {
        f"{owner}.{function.name}": parameters(function)
        for owner, function in functions(SOURCES[module])
        if len(parameters(function)) > 8 and not is_kernel(function)
        if not (function.name in PUBLIC or (owner in PUBLIC and function.name == "__init__"))
    }
    assert not too_many


def test_the_walk_sees_parameters():
    source = "class A:\n  def f(self, a, *b, c, **d):\n    def g(x): ...\n@triton.jit\ndef k(a): ...\n"
    found = {(owner, f.name): (parameters(f), is_kernel(f)) for owner, f in functions(ast.parse(source))}
    assert found == {
        ("A", "f"): (["a", "c", "b", "d"], False),
        ("A", "g"): (["x"], False),
        ("", "k"): (["a"], True),
    }


# ------------------------------------------------------------------------------------------------------------ imports


def imported(module):
    """The package's modules that a module imports, wherever in it."""
    names = set()
    for node in ast.walk(SOURCES[module]):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}: imports are absolute"
            whole = [f"{node.module}.{alias.name}" for alias in node.names]
            names |= {x if x in SOURCES or x in EXTENSIONS else str(node.module) for x in whole}
    return {x for x in names if x.split(".")[0] == "mopo_kernels"} - EXTENSIONS


def wing(module):
    return module.split(".")[1]


def test_what_is_imported_exists():
    assert not {(module, other) for module in SOURCES for other in imported(module) if other not in SOURCES}


def test_imports_point_downwards():
    upwards = [
        (module, other)
        for module in SOURCES
        if module != "mopo_kernels"
        for other in imported(module) & set(SOURCES)
        if other == "mopo_kernels" or WINGS.index(wing(other)) > WINGS.index(wing(module))
    ]
    assert not upwards
    assert imported("mopo_kernels.loss") >= {"mopo_kernels.head.policy", "mopo_kernels.objective.steps"}


def test_there_is_no_import_circle():
    """A package's `__init__` counts as imported by whatever imports one of its modules from outside."""
    graph = {module: set() for module in SOURCES}
    for module in SOURCES:
        for other in imported(module) & set(SOURCES):
            packages = itertools.accumulate(other.split("."), lambda a, b: f"{a}.{b}")
            graph[module] |= {x for x in packages if x == other or not f"{module}.".startswith(f"{x}.")}
    done = set()
    while len(done) < len(graph):
        free = {module for module in graph if module not in done and graph[module] <= done}
        assert free, f"a circle among {sorted(set(graph) - done)}"
        done |= free


def test_every_wing_is_there():
    assert {wing(module) for module in SOURCES if module != "mopo_kernels"} == set(WINGS)
