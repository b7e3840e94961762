"""Links of all pages lead somewhere, and tables that list what the code has list all of it."""

from __future__ import annotations

import re
import subprocess
from dataclasses import fields
from pathlib import Path

import pytest

from compactdist import Options, errors
from compactdist.observe.stats import PassReason

ROOT = Path(__file__).parents[1]
PAGES = sorted(
    ROOT / name
    for name in subprocess.run(
        ["git", "ls-files", "*.md"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.split()
)


def _without_code(text: str) -> str:
    """Fences and code spans hold no links."""
    return re.sub(r"`[^`\n]*`", "", re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL))


def _anchors(page: Path) -> set[str]:
    """As GitHub names headings: lower case, no punctuation, a hyphen for each blank."""
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    found: set[str] = set()
    for heading in re.findall(r"^#+ (.+)$", text, re.MULTILINE):
        plain = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading)
        slug = re.sub(r"[^\w\- ]", "", plain.lower()).strip().replace(" ", "-")
        number = 0
        while (name := slug if not number else f"{slug}-{number}") in found:
            number += 1
        found.add(name)
    return found


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    dead = []
    for link in re.findall(r"\]\(([^)\s]+)\)", _without_code(page.read_text())):
        if re.match(r"[a-z]+:", link):
            continue
        path, _, anchor = link.partition("#")
        to = page if not path else (page.parent / path).resolve()
        if not to.exists() or (anchor and to.suffix == ".md" and anchor not in _anchors(to)):
            dead.append(link)
    assert not dead


def _rows(page: str, heading: str) -> str:
    """The table behind a heading."""
    _, found, rest = (ROOT / "docs" / page).read_text().partition(f"{heading}\n")
    assert found, heading
    return re.split(r"^#+ ", rest, maxsplit=1, flags=re.MULTILINE)[0]


def test_every_reason_stands_in_its_table() -> None:
    rows = _rows("concepts.md", "### Why was it not compressed?")
    assert {str(one) for one in PassReason} == set(re.findall(r"^\| `([^`]+)` \|", rows, re.MULTILINE))


def test_every_error_stands_in_its_table() -> None:
    rows = _rows("guarantees.md", "## Errors")
    named = set(re.findall(r"`(\w+Error)`", "".join(re.findall(r"^\|([^|]*)\|", rows, re.MULTILINE))))
    assert named == set(errors.__all__) - {"CompactDistError"}


def test_every_option_stands_in_its_table_with_its_default() -> None:
    rows = _rows("concepts.md", "## Options of `wrap`, and their variables")
    named = set(re.findall(r"`(\w+)`", "".join(re.findall(r"^\|([^|]*)\|", rows, re.MULTILINE))))
    assert named == {one.name for one in fields(Options) if one.init} | {"preset", "timeout"}
    assert f"| `min_numel` | {Options.min_numel} |" in rows
    assert f"| `warmup_steps` | {Options.warmup_steps} |" in rows
