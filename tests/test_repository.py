"""Makefile, workflows and CONTRIBUTING agree, the nightly workflow keeps one issue, and tests do not import tests."""

import ast
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import yaml

import hf_gdn

ROOT = Path(__file__).parents[1]
WORKFLOWS = {path.stem: yaml.safe_load(path.read_text("utf-8")) for path in (ROOT / ".github/workflows").glob("*.yml")}
MAKEFILE = (ROOT / "Makefile").read_text("utf-8")
TARGETS = set(re.findall(r"^\.PHONY: (.*)$", MAKEFILE, re.M)[0].split())


def pins(name: str) -> dict[str, str]:
    return dict(re.findall(r"^([\w.-]+)==([\w.]+)", (ROOT / name).read_text("utf-8"), re.M))


def steps(workflow: str) -> list[dict]:
    return [step for job in WORKFLOWS[workflow]["jobs"].values() for step in job["steps"]]


def test_there_are_two_workflows():
    assert set(WORKFLOWS) == {"test", "nightly"}


@pytest.mark.parametrize("name", sorted(WORKFLOWS))
def test_a_workflow_may_only_read_and_ends(name):
    workflow = WORKFLOWS[name]
    assert workflow["permissions"] == {"contents": "read"}
    assert "concurrency" in workflow
    for job in workflow["jobs"].values():
        assert job["timeout-minutes"] <= 100
        if "write" in job.get("permissions", {}).values():
            scripts = " ".join(step.get("run", "") for step in job["steps"])
            assert not re.search(r"\b(make|pip|python)\b", scripts)  # a package released today must not find a token


@pytest.mark.parametrize(
    "name", ["Makefile", ".ci/run", "CONTRIBUTING.md", *(f".github/workflows/{w}.yml" for w in WORKFLOWS)]
)
def test_make_is_called_with_targets_that_exist(name):
    text = (ROOT / name).read_text("utf-8")
    called = {word for words in re.findall(r"^\W*(?:run: )?make ([a-z -]+)", text, re.M) for word in words.split()}
    called |= {word for words in re.findall(r"`make ([a-z -]+)", text) for word in words.split()}
    if name.endswith("/test.yml"):
        called |= set(WORKFLOWS["test"]["jobs"]["tests"]["strategy"]["matrix"]["target"])
    assert called - TARGETS == set()
    assert called or name == "Makefile"


def test_every_target_of_tests_is_explained():
    contributing = (ROOT / "CONTRIBUTING.md").read_text("utf-8")
    assert [t for t in sorted(TARGETS) if t.startswith("test") and f"| `make {t}" not in contributing] == []


def test_constraints_are_inside_the_supported_range():
    declared = re.search(r'"transformers>=([\d.]+),<6"', (ROOT / "pyproject.toml").read_text("utf-8"))
    assert declared and pins("constraints-oldest.txt")["transformers"] == declared[1] + ".0"
    assert pins("constraints.txt")["transformers"].startswith("5.")


def test_contributing_names_the_pinned_versions():
    contributing = (ROOT / "CONTRIBUTING.md").read_text("utf-8")
    assert f"| `make test` | {pins('constraints.txt')['transformers']}," in contributing
    assert f"| `make test-oldest` | {pins('constraints-oldest.txt')['transformers']}," in contributing
    assert f"Triton {pins('constraints.txt')['triton']}" in contributing


@pytest.mark.parametrize(
    "number, expected", [("", "issue create"), ("7", "issue comment 7")], ids=["no issue yet", "one is open"]
)
@pytest.mark.parametrize("log", ["transformers 5.99.0\nFAILED at the end\n", None], ids=["log", "no log"])
def test_a_failed_night_writes_one_issue(tmp_path, number, expected, log):
    """Run the workflow's own script with a `gh` that notes how it was called."""
    (tmp_path / "gh").write_text('#!/bin/sh\necho "$@" >>calls\n[ "$1 $2" != "issue list" ] || echo "$NUMBER"\n')
    (tmp_path / "gh").chmod(0o755)
    if log is not None:
        (tmp_path / "nightly.log").write_text("the beginning\n" + "a line\n" * 200 + log)
    (script,) = [step["run"] for step in steps("nightly") if "gh issue" in step.get("run", "")]
    env = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "NUMBER": number, "RUN": "address of the run"}
    subprocess.run(["bash", "-eo", "pipefail", "-c", script], cwd=tmp_path, env=env, check=True)
    calls = (tmp_path / "calls").read_text().splitlines()
    written = [call for call in calls if call.startswith(("issue create", "issue comment"))]
    assert len(written) == 1 and written[0].startswith(expected)
    assert any("--label nightly" in call for call in calls)
    body = (tmp_path / "body.md").read_text()
    assert "address of the run" in body and "the beginning" not in body
    assert log is None or (log in body and body.count("transformers 5.99.0") == 2)  # among the versions, and in the log


# ---------------------------------------------------------------------------------------------------- tests themselves

SOURCES = {
    path.relative_to(ROOT).as_posix(): ast.parse(path.read_text("utf-8"))
    for folder in ("tests", "scripts", "benchmarks", "hf_gdn")
    for path in sorted((ROOT / folder).rglob("*.py"))
}
every_source = pytest.mark.parametrize("path", SOURCES)


def imported(tree: ast.AST) -> set[str]:
    """Last parts of the names of everything imported."""
    nodes = list(ast.walk(tree))
    names = {alias.name for node in nodes if isinstance(node, ast.Import | ast.ImportFrom) for alias in node.names}
    names |= {node.module or "" for node in nodes if isinstance(node, ast.ImportFrom)}
    return {name.rpartition(".")[2] for name in names}


@every_source
def test_no_file_imports_a_test(path):
    tests = {Path(other).stem for other in SOURCES if Path(other).name.startswith("test_")}
    assert imported(SOURCES[path]) & tests == set(), "what tests share belongs in a module that is not a test"


@every_source
def test_tolerances_are_in_one_table(path):
    """No test has a budget of its own: hf_gdn/testing/tolerances.py has all of them, each with its derivation."""
    if path.startswith("tests/"):
        names = {node.id for node in ast.walk(SOURCES[path]) if isinstance(node, ast.Name)}
        own = [name for name in names if re.fullmatch(r"_?(BUDGETS?|BOUND|TOLERANCES?|ATOL|RTOL)", name)]
        assert own == []


@pytest.mark.extended
def test_the_wheel_holds_the_package_and_nothing_else(tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    shutil.copytree(ROOT / "hf_gdn", source / "hf_gdn", ignore=shutil.ignore_patterns("__pycache__"))
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "-w", str(tmp_path)]
    subprocess.run([*build, str(source)], check=True)
    (wheel,) = tmp_path.glob("*.whl")
    held = {name for name in zipfile.ZipFile(wheel).namelist() if not re.match(r"hf_gdn-[\d.]+\.dist-info/", name)}
    # READMEs tell contributors of a folder; they are not installed.
    files = {str(path.relative_to(source)) for path in (source / "hf_gdn").rglob("*") if path.is_file()}
    assert held == {name for name in files if not name.endswith("README.md")}
    assert "hf_gdn/py.typed" in held and "hf_gdn/loading/assets/qwen3_next-tiny/model.safetensors" in held


def test_the_version_stands_in_one_place_and_is_the_citation_s():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text("utf-8"))
    assert citation["version"] == hf_gdn.__version__
    assert 'dynamic = ["version"]' in (ROOT / "pyproject.toml").read_text("utf-8")


@pytest.mark.parametrize("path", sorted((ROOT / ".github/ISSUE_TEMPLATE").glob("*.yml")), ids=lambda path: path.stem)
def test_issue_forms_can_be_read_and_faults_ask_for_the_doctor(path):
    form = yaml.safe_load(path.read_text("utf-8"))
    assert form["name"] and form["description"] and all(part["attributes"]["label"] for part in form["body"])
    assert path.stem == "family" or any("doctor" in part["attributes"]["label"] for part in form["body"])
