"""README.md and docs/: links, files and modules that they name exist."""

import re
from functools import cache
from pathlib import Path

import pytest
from conftest import ROOT

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")
CODE = re.compile(r"^```.*?^```", re.M | re.S)


@cache
def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", CODE.sub("", page.read_text(encoding="utf-8")), re.M)
    plain = (re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading) for heading in headings)
    return {re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-") for heading in plain}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    text = CODE.sub("", page.read_text(encoding="utf-8"))
    for target in LINK.findall(text):
        if "://" in target:
            continue
        file, _, anchor = target.partition("#")
        linked = (page.parent / file).resolve() if file else page
        if "results" in page.parts and not linked.is_relative_to(ROOT / "docs"):
            continue  # reports link to runs, which are not kept
        assert linked.exists(), f"{target}: there is no such file"
        assert not anchor or anchor in anchors(linked), f"{target}: there is no such heading"


@pytest.mark.parametrize("page", [p for p in PAGES if "results" not in p.parts], ids=lambda page: page.name)
def test_files_and_modules_that_pages_name_exist(page):
    text = page.read_text(encoding="utf-8")
    rooms = "model|data|configs|artifacts|training|inference|cli|scripts|tests"
    for name in re.findall(rf"(?<![\w/.-])((?:{rooms})/[\w/.-]+\.(?:py|toml|cpp|yaml))", text):
        example = "NAME" in name or (page.name == "add-a-mixer.md" and "decay" in name)
        assert example or (ROOT / name).exists(), name
    for name in re.findall(r"python -m (scripts\.\w+)", text):
        path = ROOT / name.replace(".", "/")
        assert path.with_suffix(".py").exists() or path.is_dir() or name == "scripts.NAME", name
