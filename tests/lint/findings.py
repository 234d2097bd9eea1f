"""What the lint says, and what it was told to let pass."""

from __future__ import annotations

import tomllib
from dataclasses import dataclass, field
from pathlib import Path

ALLOWED = Path(__file__).with_name("allowed.toml")


@dataclass(frozen=True, order=True)
class Finding:
    """One place that breaks one rule."""

    path: str
    line: int
    rule: str
    message: str

    def __str__(self) -> str:
        """Return it the way compilers say it, so that editors can jump there."""
        return f"{self.path}:{self.line}: {self.rule}: {self.message}"


@dataclass
class Allowances:
    """The exceptions of ``allowed.toml``: a table per rule, in it a function's name and the reason."""

    tables: dict[str, dict[str, str]] = field(default_factory=dict)
    used: set[tuple[str, str]] = field(default_factory=set)

    @classmethod
    def read(cls, path: Path = ALLOWED) -> Allowances:
        """Read the file; an exception without a reason is an error."""
        tables: dict[str, dict[str, str]] = tomllib.loads(path.read_text(encoding="utf-8"))
        for rule, entries in tables.items():
            for name, reason in entries.items():
                if not reason.strip():
                    raise ValueError(f"{path}: [{rule}] {name}: say why it may")
        return cls(tables)

    def permits(self, rule: str, name: str) -> bool:
        """Whether that function may break that rule."""
        self.used.add((rule, name))
        return name in self.tables.get(rule, {})

    def unused(self, rules: set[str], path: Path = ALLOWED) -> list[Finding]:
        """Return the exceptions, of rules that were checked, that nothing needed any more."""
        return [
            Finding(path.name, 1, "stale_allowance", f"[{rule}] {name} is not needed any more: take it out")
            for rule in sorted(rules & self.tables.keys())
            for name in self.tables[rule]
            if (rule, name) not in self.used
        ]
