"""The rules of DESIGN.md, as greps and walks over syntax trees."""

from __future__ import annotations

import ast
import doctest
import importlib
import inspect
import pkgutil
import re
import subprocess
from pathlib import Path

import pytest
import torch

import attnkern

ROOT = Path(__file__).resolve().parents[1]
FIVE = ("Computes", "Layout", "Mapping", "Traffic", "Numerics")
LONG = {
    "attnkern/ops/squeeze_excite/op.py": "half of it is the schemas and docstrings of three functions",
}
"""Files over 400 lines, each with its reason."""


def _tracked(*patterns):
    """The repository's files, or all of them where there is no git (an sdist)."""
    try:
        listed = subprocess.run(
            ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
            cwd=ROOT, capture_output=True, text=True, check=True,
        ).stdout.split("\n")  # fmt: skip
    except (OSError, subprocess.CalledProcessError):
        listed = [
            str(p.relative_to(ROOT))
            for top in ("attnkern", "csrc", "tests", "bench")
            for p in (ROOT / top).rglob("*")
        ]
    paths = [ROOT / name for name in listed if name]
    return [p for p in paths if p.is_file() and any(p.match(pattern) for pattern in patterns)]


def _name(path):
    return str(path.relative_to(ROOT))


def _imports(path):
    """Every module a file imports, wherever in it."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


OPS = sorted(p.parent for p in (ROOT / "attnkern/ops").glob("*/op.py"))
PYTHON = _tracked("*.py")
PACKAGE = [p for p in PYTHON if p.is_relative_to(ROOT / "attnkern")]
CPP = _tracked("*.h", "*.cpp", "*.cuh", "*.cu")


@pytest.mark.parametrize("folder", OPS, ids=lambda p: p.name)
class TestOperatorFolder:
    def test_has_its_files_and_a_twin_in_c(self, folder):
        for name in ("README.md", "reference.py", "op.py", "module.py", "cases.py", "__init__.py"):
            assert (folder / name).is_file(), name
        twin = ROOT / "csrc/ops" / folder.name
        for name in ("params.h", "register.cpp"):
            assert (twin / name).is_file(), name

    def test_op_imports_no_backend(self, folder):
        for module in _imports(folder / "op.py"):
            assert not re.search(r"triton|\b_C\b|_native", module), module

    def test_reference_imports_torch_and_the_standard_library_alone(self, folder):
        for module in _imports(folder / "reference.py"):
            assert module.split(".")[0] in (
                "__future__",
                "collections",
                "math",
                "torch",
                "typing",
            ), module

    def test_module_checks_no_shapes(self, folder):
        forward = [
            node
            for node in ast.walk(ast.parse((folder / "module.py").read_text()))
            if isinstance(node, ast.FunctionDef) and node.name == "forward"
        ]
        assert forward
        for node in forward:
            assert len(node.body) == 1, "forward is one statement"
            assert "shape" not in ast.unparse(node)


def test_there_is_no_central_list_of_operators():
    """Nothing below or beside the operators names one; folders are discovered."""
    names = [folder.name for folder in OPS]
    shared = [p for p in PACKAGE if not p.is_relative_to(ROOT / "attnkern/ops")]
    # names only; the rules of one operator
    allowed = ("functional.py", "nn.py", "_squeeze_excite.py")
    for path in [*shared, ROOT / "CMakeLists.txt", ROOT / "setup.py"]:
        if path.name in allowed or "integrations" in path.parts:
            continue
        code = re.sub(r'""".*?"""|#[^\n]*|integrations\.\w+', "", path.read_text(), flags=re.S)
        for name in names:
            assert name not in code, f"{_name(path)} names {name}"


def test_torch_headers_stay_in_the_binding():
    for path in CPP:
        if not path.is_relative_to(ROOT / "csrc"):
            continue
        text = path.read_text()
        place = _name(path)
        bound = place.startswith("csrc/torch/") or path.name == "register.cpp"
        if not bound:
            assert not re.search(r"#include\s*<(torch|ATen|c10)/", text), place
        if place != "csrc/torch/module.cpp":
            assert "pybind11" not in text, place
        if place != "csrc/torch/glue.h":
            assert not re.search(r"#include\s*<torch/", text), f"{place}: through glue.h"


def test_launches_go_through_launch_cuh():
    for path in CPP:
        if path.is_relative_to(ROOT / "csrc/ops"):
            code = re.sub(r"//.*", "", path.read_text())
            assert "<<<" not in code, _name(path)


def test_launchers_neither_exit_nor_print_nor_throw():
    words = r"\b(printf|std::cout|std::cerr|exit|abort|assert|throw)\b\s*[(<]?"
    for path in CPP:
        if path.is_relative_to(ROOT / "csrc/ops") and path.name != "register.cpp":
            code = re.sub(r"//.*|static_assert", "", path.read_text())
            assert not re.search(words, code), (_name(path), re.search(words, code))


def _kernel_files():
    for path in CPP:
        if path.is_relative_to(ROOT / "csrc/ops"):
            text = path.read_text()
            if path.name == "kernels.cuh" or re.search(r"^(maps|mlp)\.simd\.h$", path.name):
                yield path, text
    for path in PACKAGE:
        text = path.read_text()
        if re.search(r"^def \w+_kernel\(", text, re.M):
            yield path, text


def test_every_kernel_file_states_the_five():
    files = list(_kernel_files())
    assert len(files) >= 2
    for path, text in files:
        for word in FIVE:
            assert re.search(rf"\b{word}\b", text), f"{_name(path)} does not state: {word}"


def test_long_files_have_a_reason():
    for path in [*PACKAGE, *(p for p in CPP if p.is_relative_to(ROOT / "csrc"))]:
        lines = len(path.read_text().splitlines())
        if lines > 400:
            assert _name(path) in LONG, f"{_name(path)} has {lines} lines: split it, or say why not"
    for name, reason in LONG.items():
        assert (ROOT / name).is_file(), name
        assert reason


def test_the_repository_speaks_of_the_project_alone():
    """No path of a machine, no registry's host, no figure of merit of who wrote it."""
    forbidden = re.compile(
        r"/work/|/home/\w|/root/|/tmp/(?!attnkern)|pypi\.org/simple|index-url|hugging"
        r"face\.co|files\.pythonhosted|artifactory|\bhelper session\b",
        re.I,
    )
    for path in _tracked("*"):
        if path == Path(__file__) or path.suffix in (".so", ".png", ".json"):
            continue
        found = forbidden.search(path.read_text(errors="replace"))
        assert not found, f"{_name(path)}: {found[0]}"


def test_no_binaries_or_weights_are_tracked():
    for path in _tracked("*"):
        assert path.suffix not in (".pt", ".pth", ".bin", ".onnx", ".so", ".o", ".whl", ".npz"), (
            _name(path)
        )
        assert path.stat().st_size < 1 << 20, _name(path)


def test_user_errors_are_not_asserts_and_nothing_prints():
    """Public layers raise; an assert there only tells the type checker that a value is not None."""
    for path in PACKAGE:
        if path.name in ("reference.py", "testing.py", "__main__.py", "cases.py"):
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Assert):
                narrows = ast.unparse(node.test).endswith(" is not None") and node.msg is None
                assert narrows, f"{_name(path)}:{node.lineno}"
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
                assert node.func.id not in ("print", "exit", "quit"), f"{_name(path)}:{node.lineno}"


ASSERTING = re.compile(
    r"\bassert\b|assert_|raises\(|warns\(|check\w*\(|compare\(|fresh\(|check=True"
)


def test_every_test_asserts():
    """By itself, or through a helper of the tests."""
    functions = [
        (path, node)
        for path in sorted((ROOT / "tests").glob("*.py"))
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef)
    ]
    asserting = {f.name for _, f in functions if ASSERTING.search(ast.unparse(f))}
    for path, function in functions:
        if function.name.startswith("test_"):
            called = {n.id for n in ast.walk(function) if isinstance(n, ast.Name)}
            called |= {n.attr for n in ast.walk(function) if isinstance(n, ast.Attribute)}
            assert (called | {function.name}) & asserting, f"{path.name}: {function.name}"


def test_one_test_file_a_property():
    for name in [
        "reference",
        "forward",
        "backward",
        "layouts",
        "special_values",
        "determinism",
        "opcheck",
        "compile",
        "export",
        "autocast",
        "errors",
        "select",
        "import",
        "architecture",
        "memory",
    ]:
        assert (ROOT / f"tests/test_{name}.py").is_file(), name


def test_every_overload_has_one_schema():
    names = {
        name.split("::")[1]
        for name in torch._C._dispatch_get_all_op_names()
        if name.startswith("attnkern::")
    }
    assert len(names) >= 3
    for name in {name.split(".")[0] for name in names}:
        packet = getattr(torch.ops.attnkern, name)
        schemas = {str(getattr(packet, o)._schema).split("(", 1)[1] for o in packet.overloads()}
        assert set(packet.overloads()) == {"native", "triton"}
        assert len(schemas) == 1


# ------------------------------------------------------------------ docstrings that run


def _public():
    for module in (attnkern, attnkern.functional, attnkern.nn):
        for name in module.__all__:
            value = getattr(module, name)
            if not inspect.ismodule(value):
                yield f"{module.__name__}.{name}", value


@pytest.mark.parametrize(
    ("name", "value"), list(_public()), ids=lambda v: v if isinstance(v, str) else ""
)
def test_public_names_have_an_example_that_runs(name, value):
    timm = pytest.importorskip("timm") if name == "attnkern.optimize" else None
    assert inspect.getdoc(value), f"{name} has no docstring"
    module = importlib.import_module(value.__module__)
    names = {
        **vars(module),
        **vars(attnkern.functional),
        "torch": torch,
        "attnkern": attnkern,
        "timm": timm,
    }
    x = torch.randn(2, 8, 5)
    names.update(x=x, model=torch.nn.Identity())
    found = [
        t for t in doctest.DocTestFinder(recurse=False).find(value, name, globs=names) if t.examples
    ]
    assert found, f"{name} has no example"
    for test in found:
        result = doctest.DocTestRunner(
            optionflags=doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS
        ).run(test)
        assert result.attempted
        assert not result.failed


def test_every_module_has_a_docstring():
    for info in pkgutil.walk_packages(attnkern.__path__, "attnkern."):
        path = ROOT / (info.name.replace(".", "/") + ("/__init__.py" if info.ispkg else ".py"))
        if path.is_file() and path.read_text().strip():
            assert ast.get_docstring(ast.parse(path.read_text())), info.name
