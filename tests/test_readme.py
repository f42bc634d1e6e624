"""The README tells the truth about the tree: every module is in it, and nothing that is not there."""

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("envs", "rollout", "learner", "launch")


def _tree() -> str:
    readme = (ROOT / "README.md").read_text()
    return re.search(r"## The tree\n\n```\n(.*?)```", readme, re.DOTALL).group(1)


def test_every_module_is_in_the_tree():
    named = set(re.findall(r"[\w]+\.py", _tree()))
    modules = {
        path.name for package in PACKAGES for path in (ROOT / package).rglob("*.py") if not path.name.startswith("__")
    }
    assert modules - named == set()


def test_nothing_is_in_the_tree_that_does_not_exist():
    existing = {path.name for package in (*PACKAGES, "benchmarks") for path in (ROOT / package).rglob("*.py")}
    assert set(re.findall(r"[\w]+\.py", _tree())) - existing == set()


def test_the_two_commands_exist():
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    readme = (ROOT / "README.md").read_text()
    assert {"distill", "test"} <= targets
    assert "    make distill" in readme and "    make test" in readme
