"""The examples in docs/ run, page by page, as a reader would run them."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

DOCS = Path(__file__).parent.parent / "docs"
_EXAMPLE = re.compile(r"(<!-- not run: .*? -->\n)?```python\n(.*?)```", re.DOTALL)


def examples(page: Path) -> list[str]:
    return [code for excuse, code in _EXAMPLE.findall(page.read_text()) if not excuse]


PAGES = [page for page in sorted(DOCS.glob("*.md")) if examples(page)]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_examples_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    for code in examples(page):
        exec(compile(code, str(page), "exec"), names)


def test_there_are_examples() -> None:
    assert {page.stem for page in PAGES} >= {"index", "techniques", "views", "troubleshooting"}


def test_every_page_is_in_the_contents() -> None:
    contents = (DOCS.parent / "mkdocs.yml").read_text()
    assert all(f"{page.name}" in contents for page in DOCS.glob("*.md"))
