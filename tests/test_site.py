"""The site of `make site`: every page is in its navigation, every public name in its API, links stay inside docs/."""

import re
from pathlib import Path

import pytest
import yaml

import hf_gdn
from hf_gdn import caches, errors, ops, testing

ROOT = Path(hf_gdn.__file__).parents[1]
SITE = yaml.safe_load((ROOT / "mkdocs.yml").read_text("utf-8"))
PAGES = sorted((ROOT / "docs").glob("*.md"))


def pages_of(part) -> list[str]:
    if isinstance(part, str):
        return [part]
    return [page for entry in (part.values() if isinstance(part, dict) else part) for page in pages_of(entry)]


def test_the_navigation_has_every_page_once():
    assert sorted(pages_of(SITE["nav"])) == [page.name for page in PAGES]


def test_the_home_page_leads_to_every_other():
    linked = re.findall(r"\]\((\w+\.md)\)", (ROOT / "docs/index.md").read_text("utf-8"))
    assert sorted([*linked, "index.md"]) == [page.name for page in PAGES]


def test_the_api_has_every_public_name():
    listed = re.findall(r"^::: ([\w.]+)$", (ROOT / "docs/api.md").read_text("utf-8"), re.M)
    assert len(set(listed)) == len(listed)
    public = {f"hf_gdn.{name}" for name in hf_gdn.__all__ if callable(getattr(hf_gdn, name))} - {"hf_gdn.PatchError"}
    public |= {f"{module.__name__}.{name}" for module in (ops, caches, testing) for name in module.__all__}
    public |= {f"hf_gdn.errors.{name}" for name, value in vars(errors).items() if isinstance(value, type)}
    assert public - set(listed) - {"hf_gdn.caches.SnapshotError"} == set()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links_of_a_page_stay_inside_docs(page):
    """Files elsewhere are named, not linked: the site does not have them."""
    targets = re.findall(r"\]\(([^)#]+)", page.read_text("utf-8"))
    assert [target for target in targets if not re.match(r"https?://|[\w.]+$", target)] == []
