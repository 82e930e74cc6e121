"""The blocks, links and headings of the documents, for tests/test_documentation.py."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

REPOSITORY = Path(__file__).parents[1]
DOCUMENTS = [
    *("README.md", "CONTRIBUTING.md", "SECURITY.md", "CHANGELOG.md"),
    *sorted(f"docs/{path.name}" for path in (REPOSITORY / "docs").glob("*.md")),
    *("examples/cpp/README.md", "benchmarks/README.md", "training/README.md"),
]
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Block:
    """A fenced block: its document, its place among that document's blocks, its language and its text."""

    document: str
    number: int
    language: str
    text: str

    def __str__(self) -> str:
        return f"{self.document}#{self.number}"


def text_of(document: str) -> str:
    """The whole document."""
    return (REPOSITORY / document).read_text(encoding="utf-8")


def blocks(*languages: str) -> list[Block]:
    """The blocks of all documents in these languages, in reading order."""
    return [
        Block(document, number, language, text)
        for document in DOCUMENTS
        for number, (language, text) in enumerate(FENCE.findall(text_of(document)))
        if language in languages
    ]


def commands(block: Block) -> list[str]:
    """The commands of a shell block, one an item: continued lines joined, comments and empty lines left out."""
    lines = block.text.replace("\\\n", " ").splitlines()
    bare = [re.sub(r"(^|\s)#.*$", "", line).strip() for line in lines]
    return [line for line in bare if line]


def links(document: str) -> list[str]:
    """Targets of the document's links and pictures outside of blocks."""
    return re.findall(r"\]\(([^)\s]+)\)", FENCE.sub("", text_of(document)))


def anchors(document: str) -> set[str]:
    """What a heading can be linked by, as GitHub makes it: lower case, spaces as hyphens, other signs dropped."""
    headings = re.findall(r"^#+ (.+)$", FENCE.sub("", text_of(document)), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


def table_rows(document: str, first_cell: str) -> list[list[str]]:
    """The rows of the table whose heading's first cell is that, as lists of cells."""
    lines = text_of(document).splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith(f"| {first_cell} |"))
    rows = []
    for line in lines[start + 2 :]:
        if not line.startswith("|"):
            break
        rows.append([cell.strip() for cell in line.strip("|").split("|")])
    return rows
