"""README and docs: Python snippets run on a tiny model, commands are parsed, links and named files exist."""

import re
import shlex
from pathlib import Path

import pytest
import torch
import typer.main

import hf_gdn
from hf_gdn.cli.app import app
from tests import tiny

ROOT = Path(hf_gdn.__file__).parents[1]
README = ROOT / "README.md"
DOCS = sorted((ROOT / "docs").glob("*.md"))
PAGES = [README, ROOT / "CONTRIBUTING.md", *DOCS]


def blocks(page: Path, kind: str) -> list[str]:
    found = re.findall(r"^```(\w*)\n(.*?)^```$", page.read_text("utf-8"), re.S | re.M)
    return [text for name, text in found if name == kind]


def commands(page: Path) -> list[list[str]]:
    """The arguments of hf-gdn in every line of shell that calls it."""
    found = []
    for block in blocks(page, ""):
        for line in block.replace("\\\n", " ").splitlines():
            called = re.search(r"^(?:\S*hf-gdn|.*-m hf_gdn\.eval) +(.*)", line)
            if called:
                found.append(shlex.split(called[1], comments=True))
    return found


WITH_PYTHON = [page for page in [README, *DOCS] if blocks(page, "python")]


@pytest.fixture
def names(monkeypatch, tmp_path):
    """What the snippets take for granted."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("HF_GDN_BACKEND", raising=False)
    torch.manual_seed(0)
    ids = torch.randint(1, 64, (1, 30))
    return dict(
        hf_gdn=hf_gdn,
        model=tiny.model("qwen3_next"),
        draft=tiny.model("qwen3_next", seed=1),
        inputs=dict(input_ids=ids, attention_mask=torch.ones_like(ids)),
        system_prompt=ids[:, :20],
        question=ids[:, 20:],
        continuation=ids,
    )


@pytest.mark.parametrize("page", WITH_PYTHON, ids=lambda page: page.stem)
def test_the_python_of_a_page_runs_from_top_to_bottom(page, names):
    hf_gdn.patch()
    for code in blocks(page, "python"):
        exec(code, names)
    if page.stem == "caches":
        assert names["prefixes"].tokens_read == 29


def test_the_first_example_prints_code(names, capsys):
    exec(blocks(README, "python")[0], names)
    assert "import" in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments",
    [pytest.param(words, id=f"{page.stem}: {' '.join(words)}") for page in PAGES for words in commands(page)],
)
def test_commands(arguments):
    command = typer.main.get_command(app)
    name, rest = arguments[0], [word.replace("…", "MODEL") for word in arguments[1:]]
    command.commands[name].make_context(name, rest)


def test_commands_that_are_not_there_are_found():
    assert sum(len(commands(page)) for page in PAGES) >= 7
    with pytest.raises(Exception, match="No such option"):
        test_commands(["ppl", "--no-such-option"])


def anchors(page: Path) -> set[str]:
    """The anchors that GitHub makes of a page's headings."""
    titles = re.findall(r"^#+ (.*)$", re.sub(r"^```.*?^```$", "", page.read_text("utf-8"), flags=re.S | re.M), re.M)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links_inside_the_repository_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)]+)\)", page.read_text("utf-8")):
        name, _, anchor = target.partition("#")
        if not name.startswith("http"):
            other = (page.parent / name).resolve() if name else page
            assert other.exists(), f"{target} does not exist"
            assert not anchor or anchor in anchors(other), f"{target}: no such heading"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_files_that_a_page_names_exist(page):
    folders = "hf_gdn|tests|docs|scripts|benchmarks|examples"
    for name in re.findall(rf"`((?:{folders})/[\w./-]+)`", page.read_text("utf-8")):
        assert (ROOT / name).exists(), name


def test_the_readme_is_short_and_its_make_targets_exist():
    assert len(README.read_bytes()) <= 6 * 1024
    targets = re.findall(r"^make (\w+)", "\n".join(blocks(README, "")), re.M)
    assert targets == ["report", "test"]
    assert all(re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.M) for target in targets)
