"""Links inside the project lead to a file, and to a heading of it."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "benchmarks/RESULTS.md")]
PAGES += sorted((ROOT / "docs").rglob("*.md"))
INCLUDED = {"results.md": "../benchmarks/RESULTS.md", "changelog.md": "../CHANGELOG.md"}  # pages that are other files


def text_of(page):
    page = page.parent / INCLUDED.get(page.name, page.name)
    return re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)


def anchors(page):
    headings = re.findall(r"^#+ (.*)", text_of(page), re.MULTILINE)
    return {"".join(c for c in heading.lower().replace(" ", "-") if c.isalnum() or c in "-_") for heading in headings}


def test_links_lead_somewhere():
    seen = 0
    for page in PAGES:
        if page.name in INCLUDED:
            continue
        for link in re.findall(r"\]\(([^)\s]+)\)", text_of(page)):
            if link.startswith("http"):
                continue
            file, _, heading = link.partition("#")
            target = (page.parent / file).resolve() if file else page
            assert target.exists(), f"{page.relative_to(ROOT)}: {link}"
            assert not heading or heading in anchors(target), f"{page.relative_to(ROOT)}: {link}"
            seen += 1
    assert seen > 40


def test_every_page_of_the_manual_is_in_its_table_of_contents():
    listed = set(re.findall(r"^([\w/-]+)$", (ROOT / "docs" / "index.md").read_text(), re.MULTILINE))
    pages = {str(page.relative_to(ROOT / "docs").with_suffix("")) for page in PAGES if ROOT / "docs" in page.parents}
    assert pages - {"index"} == listed - {"notebook"}  # copied there when the manual is built


def test_folders_and_files_that_the_manual_names_exist():
    named = set()
    for page in PAGES:
        if page.name != "CHANGELOG.md":
            named |= set(
                re.findall(r"`((?:sslvision|tests|docs|scripts|recipes|notebooks|benchmarks)/[\w./-]*)`", text_of(page))
            )
    missing = sorted(name for name in named if not (ROOT / name).exists())
    assert not missing
