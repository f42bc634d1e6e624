"""Which package may import which, read from the source; nothing is imported or run.

    envs      nothing of ours                    learner   rollout.trajectory and rollout.rendering alone
    rollout   envs                               launch    all

`learner/audit/__main__.py` is a program, as those of launch/ are, and may import what they may.
`vllm` is imported in at most one file of rollout/ and `deepspeed` in at most one of learner/, both inside a function,
so that everything imports without them. A module has a docstring and no name of the standard library, since launchers
that run a file put its folder on the path. The last tests plant a breach of each rule in a scratch tree and expect it
named.
"""

from __future__ import annotations

import ast
import functools
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MAY_IMPORT = {
    "envs": ("envs",),
    "rollout": ("rollout", "envs"),
    "learner": ("learner", "rollout.trajectory", "rollout.rendering"),
    "launch": ("launch", "envs", "rollout", "learner"),
}
PROGRAMS = {Path("learner/audit/__main__.py")}
"""Outside launch/: nothing imports them but what runs them."""
ENGINE_HOME = {"vllm": "rollout", "deepspeed": "learner"}
"""Engine -> the only package that may import it, in one file."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Import:
    """One imported module as written in one place; relative imports are resolved."""

    file: Path
    line: int
    module: str
    late: bool
    """Inside a function, or seen by a type checker only."""

    @property
    def top(self) -> str:
        return self.module.partition(".")[0]

    def __str__(self) -> str:
        return f"{self.file}:{self.line} imports {self.module}"


@functools.cache
def modules(root: Path) -> dict[Path, ast.Module]:
    """Parsed source of every module of the layers, by path relative to `root`; read once."""
    return {
        path.relative_to(root): ast.parse(path.read_text(encoding="utf-8"), str(path))
        for layer in MAY_IMPORT
        for path in sorted((root / layer).rglob("*.py"))
    }


def imports(file: Path, tree: ast.Module) -> Iterator[Import]:
    """Every import of a module: statements, and `importlib.import_module` or `__import__` of a literal."""

    def names(node: ast.AST) -> Iterator[str]:
        match node:
            case ast.Import(names=aliases):
                yield from (alias.name for alias in aliases)
            case ast.ImportFrom(module=module, names=aliases, level=level):
                package = file.parent.parts
                base = ".".join((*package[: len(package) - level + 1], *filter(None, [module]))) if level else module
                # `from rollout import trajectory` may name a module or an attribute: the longer name is judged.
                yield from (f"{base}.{alias.name}" for alias in aliases)
            case ast.Call(func=func, args=[ast.Constant(value=str(name)), *_]):
                if ast.unparse(func) in ("importlib.import_module", "import_module", "__import__"):
                    yield name

    def walk(node: ast.AST, late: bool) -> Iterator[Import]:
        for name in names(node):
            yield Import(file=file, line=getattr(node, "lineno", 0), module=name, late=late)
        if isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING"):
            for child in node.body:
                yield from walk(child, True)
            for child in node.orelse:
                yield from walk(child, late)
            return
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            # Decorators and defaults run when the module does; the body runs later.
            for child in (*node.decorator_list, node.args):
                yield from walk(child, late)
            for child in node.body:
                yield from walk(child, True)
            return
        late = late or isinstance(node, ast.Lambda)
        for child in ast.iter_child_nodes(node):
            yield from walk(child, late)

    yield from walk(tree, False)


@functools.cache
def all_imports(root: Path) -> dict[Path, list[Import]]:
    """Every import of every module of the layers; read once."""
    return {file: list(imports(file, tree)) for file, tree in modules(root).items()}


def layer_breaches(root: Path) -> list[str]:
    """Imports of ours across layers that the table above does not allow."""
    ours = {*MAY_IMPORT, "configs", "tests", "benchmarks"}
    return [
        f"{found}; {layer}/ may import {', '.join(MAY_IMPORT[layer])}"
        for file, found_there in all_imports(root).items()
        for layer in ["launch" if file in PROGRAMS else file.parts[0]]
        for found in found_there
        if found.top in ours and not any(f"{found.module}.".startswith(f"{allowed}.") for allowed in MAY_IMPORT[layer])
    ]


def engine_breaches(root: Path) -> list[str]:
    """Imports of vllm or deepspeed in the wrong package, in a second file, or at module level."""
    breaches = []
    for engine, home in ENGINE_HOME.items():
        found = [each for found_there in all_imports(root).values() for each in found_there if each.top == engine]
        breaches += [f"{each}; only {home}/ may" for each in found if each.file.parts[0] != home]
        breaches += [f"{each} at module level; import it inside a function" for each in found if not each.late]
        files = sorted({str(each.file) for each in found if each.file.parts[0] == home})
        if len(files) > 1:
            breaches.append(f"{engine} is imported in {len(files)} files, one may: {', '.join(files)}")
    return breaches


def name_breaches(root: Path) -> list[str]:
    """Modules and packages named after the standard library."""
    return [
        f"{file} shadows the standard library's {name}"
        for file in modules(root)
        for name in (*file.parts[1:-1], file.stem)
        if name in sys.stdlib_module_names
    ]


def docstring_breaches(root: Path) -> list[str]:
    """Modules that do not say what they are."""
    return [f"{file} has no docstring" for file, tree in modules(root).items() if not ast.get_docstring(tree)]


CHECKS = [layer_breaches, engine_breaches, name_breaches, docstring_breaches]


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_source_keeps_the_rule(check):
    assert check(ROOT) == []


def test_every_layer_is_read():
    assert {file.parts[0] for file in modules(ROOT)} == set(MAY_IMPORT)


def scratch(root: Path, **sources: str) -> Path:
    """A tree with one documented module per entry; `envs__sandbox__wire` is envs/sandbox/wire.py."""
    for name, source in sources.items():
        program = name.endswith("____main__")
        path = root / f"{name.removesuffix('____main__').replace('__', '/')}{'/__main__' * program}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f'"""Scratch."""\n{source}\n', encoding="utf-8")
    return root


@pytest.mark.parametrize(
    ("module", "source", "names"),
    [
        ("envs__pool", "import rollout.worker", "rollout.worker"),
        ("envs__sandbox__wire", "from launch import config", "launch.config"),
        ("envs__sandbox__wire", "from ...rollout import worker", "rollout.worker"),
        ("rollout__worker", "def late():\n    from learner.trainer import Trainer", "learner.trainer"),
        ("rollout__worker", "import importlib\nx = importlib.import_module('launch.distill')", "launch.distill"),
        ("learner__trainer", "from rollout import policy", "rollout.policy"),
        ("learner__trainer", "import rollout", "imports rollout"),
        ("learner__trainer", "import rollout.trajectory_queue", "rollout.trajectory_queue"),
        ("learner__trainer", "from envs.base import Env", "envs.base"),
        ("launch__distill", "import tests.conftest", "tests.conftest"),
    ],
)
def test_layer_breach_is_named(tmp_path, module, source, names):
    (breach,) = layer_breaches(scratch(tmp_path, **{module: source}))
    assert names in breach and module.replace("__", "/") in breach


def test_a_program_imports_what_launch_may_and_its_package_does_not(tmp_path):
    knows_ledgers = "from rollout.ledger import Ledger"
    root = scratch(tmp_path, learner__audit____main__=knows_ledgers, learner__audit__report=knows_ledgers)
    (breach,) = layer_breaches(root)
    assert "learner/audit/report.py" in breach and "rollout.ledger" in breach


def test_allowed_imports_pass(tmp_path):
    root = scratch(
        tmp_path,
        envs__pool="import json, ray\nfrom .base import Env\nfrom envs.base import Task",
        rollout__worker="import envs\nfrom envs.base import Env\nfrom . import policy",
        learner__trainer="from rollout.trajectory import Trajectory\nfrom rollout import rendering, trajectory",
        launch__distill="import envs, rollout.worker\nfrom learner import trainer",
    )
    assert layer_breaches(root) == []


@pytest.mark.parametrize(
    ("sources", "says"),
    [
        ({"rollout__a": "import vllm"}, "module level"),
        ({"rollout__a": "try:\n    from vllm import LLM\nexcept ImportError:\n    pass"}, "module level"),
        ({"rollout__a": "class A:\n    import vllm.config"}, "module level"),
        ({"learner__a": "def f():\n    import vllm"}, "only rollout/ may"),
        ({"launch__a": "def f():\n    import deepspeed"}, "only learner/ may"),
        ({"rollout__a": "def f():\n    import vllm", "rollout__b": "def f():\n    import vllm"}, "2 files"),
    ],
)
def test_engine_breach_is_named(tmp_path, sources, says):
    (breach,) = engine_breaches(scratch(tmp_path, **sources))
    assert says in breach


def test_one_late_engine_import_passes(tmp_path):
    source = "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import vllm\ndef f():\n    import vllm.config"
    assert engine_breaches(scratch(tmp_path, rollout__a=source)) == []


@pytest.mark.parametrize("module", ["rollout__queue", "envs__code__wire", "learner__types"])
def test_stdlib_name_is_named(tmp_path, module):
    (breach,) = name_breaches(scratch(tmp_path, **{module: ""}))
    assert "shadows the standard library's" in breach


def test_missing_docstring_is_named(tmp_path):
    (tmp_path / "envs").mkdir()
    (tmp_path / "envs/bare.py").write_text("x = 1\n", encoding="utf-8")
    (breach,) = docstring_breaches(tmp_path)
    assert "envs/bare.py" in breach
