"""What gets installed: the metadata, the lock files and the wheel agree with one another and with the source."""

from __future__ import annotations

import ast
import importlib.metadata
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from functools import cache
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
PACKAGES = ("envs", "rollout", "learner", "launch")
LOCKS = {"cpu": ROOT / "requirements-cpu.lock", "gpu": ROOT / "requirements-gpu.lock"}
SUPPORTED = [
    {"python_version": version, "python_full_version": f"{version}.0", "platform_machine": cpu, "sys_platform": "linux"}
    for version in ("3.11", "3.12", "3.13")
    for cpu in ("x86_64", "aarch64")
]
"""Marker environments that the CPU lock is for."""


@cache
def project() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def declared(*extras: str) -> list[Requirement]:
    """Direct requirements with these extras; `apprentice[x]` inside an extra is followed."""
    found = [Requirement(line) for line in project()["dependencies"]]
    for extra in extras:
        for line in project()["optional-dependencies"][extra]:
            requirement = Requirement(line)
            found += declared(*requirement.extras) if requirement.name == "apprentice" else [requirement]
    return found


def pins(lock: Path, environment: dict[str, str]) -> dict[str, list[str]]:
    """Canonical name -> pinned versions that `lock` installs there. Raises `ValueError` on a line that is no pin."""
    found: dict[str, list[str]] = {}
    for line in lock.read_text(encoding="utf-8").splitlines():
        text = re.sub(r"(^|\s+)#.*", "", line)
        if not text:
            continue
        requirement = Requirement(text)
        specifiers = list(requirement.specifier)
        if len(specifiers) != 1 or specifiers[0].operator != "==" or "*" in specifiers[0].version:
            raise ValueError(f"{lock.name}: not one exact version: {line!r}")
        if requirement.marker is None or requirement.marker.evaluate(environment):
            found.setdefault(canonicalize_name(requirement.name), []).append(specifiers[0].version)
    return found


def environments(build: str) -> list[dict[str, str]]:
    return SUPPORTED if build == "cpu" else SUPPORTED[:1]


@pytest.mark.parametrize("build", LOCKS)
def test_lock_pins_each_package_once(build):
    for environment in environments(build):
        assert {name: versions for name, versions in pins(LOCKS[build], environment).items() if len(versions) > 1} == {}


@pytest.mark.parametrize("build", LOCKS)
def test_lock_satisfies_the_metadata(build):
    for environment in environments(build):
        locked = pins(LOCKS[build], environment)
        for requirement in declared(build, "dev"):
            if requirement.marker is None or requirement.marker.evaluate(environment):
                versions = locked.get(canonicalize_name(requirement.name), [])
                assert versions and all(requirement.specifier.contains(version) for version in versions), (
                    f"{LOCKS[build].name} has {versions}, pyproject.toml wants {requirement}; run `make lock`"
                )


def test_cpu_lock_has_no_cuda():
    for environment in SUPPORTED:
        locked = pins(LOCKS["cpu"], environment)
        assert locked["torch"][0].endswith("+cpu")
        assert [name for name in locked if re.match(r"nvidia|cuda|cupy|triton|torch(vision|audio|codec)", name)] == []


def test_reading_a_lock_refuses_a_range(tmp_path):
    lock = tmp_path / "requirements.lock"
    lock.write_text("numpy==2.3.5  # via x\nrich>=14\n", encoding="utf-8")
    with pytest.raises(ValueError, match="rich>=14"):
        pins(lock, SUPPORTED[0])


def test_third_party_imports_are_declared():
    """A module that we import is brought by a direct requirement, not by luck through another package."""
    ours = {*PACKAGES, "configs", "benchmarks", "tests"}
    distributions = importlib.metadata.packages_distributions()
    direct = {canonicalize_name(requirement.name) for requirement in declared("cpu", "gpu", "tracking")}
    undeclared = set()
    for path in (path for package in PACKAGES for path in (ROOT / package).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                names = [node.module]
            for top in {name.partition(".")[0] for name in names} - ours - sys.stdlib_module_names:
                owners = {canonicalize_name(name) for name in distributions.get(top, [top])}
                if not owners & direct:
                    undeclared.add(f"{path.relative_to(ROOT)} imports {top}, of {sorted(owners)}")
    assert undeclared == set()


@pytest.mark.parametrize("package", PACKAGES)
def test_package_imports_light(package):
    """Not one of the heavy libraries is loaded by importing a package, so that `--help` answers at once."""
    heavy = {"torch", "vllm", "ray", "deepspeed", "transformers", "trl", "faiss", "datasets", "numba"}
    code = f"import sys, {package}; print(*sorted({heavy!r} & set(sys.modules)))"
    ran = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert (ran.returncode, ran.stdout.strip(), ran.stderr) == (0, "", "")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> set[str]:
    """File names in a wheel built from a copy of the tree, without the network."""
    source = tmp_path_factory.mktemp("source")
    target = tmp_path_factory.mktemp("wheel")
    for package in (*PACKAGES, "configs"):
        # Not what another process of the tests is just writing beside a module.
        shutil.copytree(ROOT / package, source / package, ignore=shutil.ignore_patterns("*.pyc.*"))
    for name in ("pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, source / name)
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "--no-index"]
    built = subprocess.run([*command, "-w", target, source], capture_output=True, text=True, timeout=110)
    assert built.returncode == 0, built.stderr
    (path,) = target.glob("*.whl")
    with zipfile.ZipFile(path) as archive:
        return set(archive.namelist())


def test_wheel_holds_all_that_is_needed_and_no_more(wheel):
    needed = {
        str(path.relative_to(ROOT))
        for package, kinds in (
            *((package, (".py",)) for package in PACKAGES),
            ("configs", (".yaml",)),
            ("learner/base_student", (".json", ".safetensors", ".md")),
        )
        for path in (ROOT / package).rglob("*")
        if path.suffix in kinds
    } | {
        str(path.relative_to(ROOT))
        for path in (ROOT / "envs").glob("**/data/**/*")
        if path.is_file() and path.suffix != ".pyc"
    }
    files = {name for name in wheel if ".dist-info/" not in name}
    assert needed - files == set()
    assert {name.partition("/")[0] for name in files} <= {*PACKAGES, "configs"}
    assert [name for name in files if "__pycache__" in name] == []


def test_wheel_metadata(wheel):
    assert f"apprentice-{project()['version']}.dist-info/METADATA" in wheel
    assert (project()["license"], project()["requires-python"]) == ("Apache-2.0", ">=3.11")
