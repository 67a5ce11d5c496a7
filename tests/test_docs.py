"""README and docs: Python snippets run on a tiny model, every line of shell is parsed, links and named files exist."""

import re
from pathlib import Path

import pytest
import torch

import hf_gdn
from hf_gdn.upstream import paged
from tests import shell_lines
from tests import tiny_models as tiny
from tests.shell_lines import ROOT, blocks

README = ROOT / "README.md"
DOCS = sorted((ROOT / "docs").glob("*.md"))
PAGES = [*(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "SECURITY.md", "benchmarks/README.md")), *DOCS]


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


WITH_PYTHON = [page for page in [README, *DOCS] if blocks(page.read_text("utf-8"), "python")]


@pytest.fixture
def names(monkeypatch, tmp_path):
    """What the snippets take for granted: a patched model and token ids. Pages import hf_gdn themselves."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("HF_GDN_BACKEND", raising=False)
    torch.manual_seed(0)
    ids = torch.randint(1, 64, (1, 30))
    return dict(
        model=tiny.model("qwen3_next"),
        draft=tiny.model("qwen3_next", seed=1),
        inputs=dict(input_ids=ids, attention_mask=torch.ones_like(ids)),
        system_prompt=ids[:, :20],
        question=ids[:, 20:],
        continuation=ids,
    )


@pytest.mark.parametrize("page", WITH_PYTHON, ids=lambda page: page.stem)
def test_the_python_of_a_page_runs_from_top_to_bottom(page, names):
    if page.stem == "serving" and paged.missing() is not None:
        pytest.skip(str(paged.missing()))
    for code in blocks(page.read_text("utf-8"), "python"):
        if ".from_pretrained(" in code:  # it loads a model of its own, so it stands alone
            hf_gdn.unpatch()
            names.clear()
        else:
            hf_gdn.patch()
        exec(code, names)
    if page.stem == "caches":
        assert names["prefixes"].tokens_read == 29


def test_the_first_example_prints_code(monkeypatch, capsys):
    monkeypatch.delenv("HF_GDN_BACKEND", raising=False)
    exec(blocks(README.read_text("utf-8"), "python")[0], {})
    assert "import" in capsys.readouterr().out


@pytest.fixture(autouse=True)
def this_pytest(pytestconfig, monkeypatch):
    monkeypatch.setattr(shell_lines.PYTEST, "config", pytestconfig, raising=False)


def commands(complete: bool) -> list:
    """Lines of shell blocks, or commands inside sentences, each once."""
    find = shell_lines.lines if complete else shell_lines.inline
    found = {line: page for page in reversed(PAGES) for line in find(page.read_text("utf-8"))}
    return [pytest.param(line, id=f"{page.stem}: {line}") for line, page in found.items()]


@pytest.mark.parametrize("line", commands(complete=True))
def test_a_line_of_shell_is_one_that_its_program_takes(line):
    shell_lines.check(line)


@pytest.mark.parametrize("line", commands(complete=False))
def test_a_command_in_a_sentence_is_one_that_its_program_takes(line):
    shell_lines.check(line, complete=False)


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_no_shell_hides_in_blocks_of_another_kind(page):
    text = page.read_text("utf-8")
    # py: Python that needs packages which may not be there; tests/ecosystem runs the same.
    assert set(re.findall(r"^```(\w+)$", text, re.M)) <= {"python", "py", "toml", "text"}
    for code in shell_lines.blocks(text, "py"):
        compile(code, str(page), "exec")
    assert not re.findall(
        rf"^ {{4,}}(?:{'|'.join(shell_lines.RULES)}) ", re.sub(r"^```.*?^```$", "", text, flags=re.S | re.M)
    )


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("hf-gdn ppl --no-such-option", "No such option"),
        ("hf-gdn --no-such-option ppl", "No such option"),
        ("hf-gdn nothing", "has no command 'nothing'; commands: "),
        ("hf-gdn compare A.json", "Missing"),
        ("hf-gdn run -m hf_gdn.nothing", "no module hf_gdn.nothing"),
        ("accelerate launch --num_processes 2 -m hf_gdn.eval ppl --windows few", "valid integer"),
        ("torchrun -m hf_gdn ppl --no-such-option", "No such option"),
        ("make test-nothing", "no target test-nothing; targets: "),
        ("make test NOTHING=1", "no variable NOTHING"),
        ("pip install '.[nothing]'", "no extra nothing; extras: "),
        ("pip install numpy", "not hf-gdn"),
        ("pytest tests/nothing.py", "no file tests/nothing.py"),
        ("pytest -m nothing", "no marker nothing; markers: "),
        ("pytest --nothing", "nothing"),
        ("python -m pytest -x", "no rule covers pytest's option -x"),
        ("python scripts/nothing.py", "no script scripts/nothing.py"),
        ("NOTHING=1 make test", "nothing reads NOTHING"),
        ("rm -rf .", "no rule covers 'rm -rf .'; rules: hf-gdn, make"),
    ],
    ids=str,
)
def test_a_wrong_line_is_refused(line, reason):
    with pytest.raises(Exception, match=re.escape(reason)):
        shell_lines.check(line)


def test_a_script_s_own_parser_is_asked(capsys):
    shell_lines.check("python benchmarks/serving.py --model qwen3_next-tiny")
    with pytest.raises(SystemExit):
        shell_lines.check("python benchmarks/serving.py --no-such-option")
    assert "unrecognized arguments: --no-such-option" in capsys.readouterr().err


def anchors(page: Path) -> set[str]:
    """The anchors that GitHub makes of a page's headings."""
    titles = re.findall(r"^#+ (.*)$", re.sub(r"^```.*?^```$", "", page.read_text("utf-8"), flags=re.S | re.M), re.M)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_inside_the_repository_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)]+)\)", page.read_text("utf-8")):
        name, _, anchor = target.partition("#")
        if not name.startswith("http"):
            other = (page.parent / name).resolve() if name else page
            assert other.exists(), f"{target} does not exist"
            assert not anchor or anchor in anchors(other), f"{target}: no such heading"


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_files_that_a_page_names_exist(page):
    folders = "hf_gdn|tests|docs|scripts|benchmarks|examples"
    for name in re.findall(rf"`((?:{folders})/[\w./-]+)`", page.read_text("utf-8")):
        assert (ROOT / name).exists(), name


def test_the_readme_is_short_and_its_make_targets_exist():
    assert len(README.read_bytes()) <= 6 * 1024
    targets = re.findall(r"^make (\w+)", "\n".join(blocks(README.read_text("utf-8"), "")), re.M)
    assert targets == ["report", "test"]
    assert all(re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.M) for target in targets)
