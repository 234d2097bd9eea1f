"""The examples of a document: its fenced blocks, with what the comments before them say about running them."""

from __future__ import annotations

import re
import textwrap
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("**/*.md"))]

_BLOCK = re.compile(
    r"(?P<marks>(?:^ *<!-- [^\n]* -->\n)*)^(?P<indent> *)```(?P<language>\w*)\n(?P<code>.*?)^(?P=indent)```$",
    re.MULTILINE | re.DOTALL,
)
_MARK = re.compile(r"<!-- (not run|file|fails|roles): (.*?) -->")


@dataclass
class Example:
    """One block; ``marks`` are the comments before it, ``output`` the ``text`` block right after it."""

    document: Path
    line: int
    language: str
    code: str
    marks: dict[str, str] = field(default_factory=dict)
    output: str | None = None

    @property
    def place(self) -> str:
        """Where it is, the way editors jump to it."""
        return f"{self.document.relative_to(ROOT)}:{self.line}"


def read_examples(document: Path) -> list[Example]:
    """The examples of the document, in its order."""
    text = document.read_text(encoding="utf-8")
    examples: list[Example] = []
    end = 0
    for block in _BLOCK.finditer(text):
        between, end = text[end : block.start()], block.end()
        code = textwrap.dedent(block["code"])
        if block["language"] == "text" and examples and examples[-1].language == "sql" and not between.strip():
            examples[-1].output = code
            continue
        line = text.count("\n", 0, block.start("indent")) + 1
        marks = dict(_MARK.findall(block["marks"]))
        examples.append(Example(document, line, block["language"], code, marks))
    return examples
