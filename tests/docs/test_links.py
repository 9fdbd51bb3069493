"""Links in the documents lead somewhere: to a file of the project, or to a heading of it."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = [
    Path(name)
    for name in subprocess.check_output(["git", "ls-files", "*.md"], cwd=ROOT, text=True).split("\n")
    if name and (ROOT / name).is_file()
]
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
CODE = re.compile(r"```.*?```|`[^`\n]*`", re.DOTALL)


def _anchors(page: Path) -> set[str]:
    """Anchors of headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=str)
def test_links_lead_somewhere(page: Path) -> None:
    dead = []
    for target in LINK.findall(CODE.sub("", (ROOT / page).read_text())):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        place = (ROOT / page).parent / path if path else ROOT / page
        if not place.exists() or (anchor and place.suffix == ".md" and anchor not in _anchors(place)):
            dead.append(target)
    assert not dead, f"{page} links to {dead}"


def test_paths_named_in_the_documents_exist() -> None:
    """Modules and files in backticks, of the package and of the tests."""
    missing = []
    for page in PAGES:
        if page.name == "CHANGELOG.md":
            continue
        for path in re.findall(
            r"`((?:sae_research|scripts|tests|benchmarks|docs)/[\w/.-]+\.\w+)`", (ROOT / page).read_text()
        ):
            if not (ROOT / path).exists():
                missing.append(f"{page}: {path}")
    assert not missing
