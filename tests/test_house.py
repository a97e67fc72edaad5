"""The house: few files, plain imports that go one way, documents that say what is there."""

import ast
import dataclasses
import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

from bench import tables

ROOT = Path(__file__).parents[1]
SCRIPTS = ("train_sft", "train_rl", "make_data", "evaluate")
LAYERS = ("runs", "safety", "maths", "scores", "report", "kernels", "model", "engine", "judges", "suites", "trainers")
PRODUCT = [*ROOT.glob("*.py"), *(p for name in ("kernels", "pocket", "examples") for p in ROOT.glob(f"{name}/**/*.py"))]


def test_the_house_is_small():
    assert len(list(ROOT.glob("*.py"))) <= 14
    assert sum(map(tables.lines, PRODUCT)) <= 9_238  # lowered with every cut, never raised
    assert tables.lines(ROOT / "tests") <= 9_960
    flags = sum(len(dataclasses.fields(importlib.import_module(name).Config)) for name in SCRIPTS)
    assert flags <= 95


def test_the_readme_is_short_and_lists_every_file():
    """Its counts of lines are compared with the tables, below."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(readme.splitlines()) <= 200
    listed = {name for _, name in tables.COUNT.findall(readme)}
    assert listed == {path.name for path in ROOT.glob("*.py")} | {f"{name}/" for name in tables.FOLDERS}


@pytest.mark.parametrize("page", tables.PAGES)
def test_every_table_is_that_of_the_result_files(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    assert tables.BLOCK.search(text) and tables.rebuilt(text) == text
    assert tables.rebuilt(text.replace("| base |", "| basis |")) == text
    assert page == "RESULTS.md" or tables.rebuilt(re.sub(r"`engine.py` \| \d+", "`engine.py` | 1", text)) == text


TREES = {path: ast.parse(path.read_text(encoding="utf-8")) for path in PRODUCT}


def imported(nodes) -> set[str]:
    """Top-level names that these nodes import."""
    modules = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    modules |= {node.module or "" for node in nodes if isinstance(node, ast.ImportFrom)}
    return {name.partition(".")[0] for name in modules}


def test_imports_go_one_way_and_ours_are_at_the_top():
    """A layer imports only layers before it; no script imports a script; nothing of the product a bench or a test."""
    for path, tree in TREES.items():
        ours = imported(nodes := list(ast.walk(tree))) & {*LAYERS, *SCRIPTS, "bench", "tests", "examples"}
        assert not ours & {*SCRIPTS, "bench", "tests"}, path
        if path.stem in LAYERS and path.parent == ROOT:
            assert ours <= set(LAYERS[: LAYERS.index(path.stem)]), (path, ours)
        inner = imported([node for node in nodes if node not in tree.body])
        assert not inner & {*LAYERS, *SCRIPTS, "pocket", "torch"}, (path, inner)


def test_functions_are_short():
    functions = [node for tree in TREES.values() for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    lengths = [node.end_lineno - node.lineno + 1 for node in functions]
    assert max(lengths) <= 80 and sorted(lengths)[len(lengths) // 2] < 15


@pytest.mark.parametrize(("name", "heavy"), [("report", "torch"), ("report", "engine"), ("runs", "torch")])
def test_light_modules_stay_light(name, heavy):
    code = f"import sys, {name}; sys.exit({heavy!r} in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0
