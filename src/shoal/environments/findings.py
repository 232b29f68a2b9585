"""What `shoal check` found: findings, measurements, and the report that holds them."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from shoal.types import EnvironmentSpec

Severity = Literal["error", "warning", "note"]


@dataclass(frozen=True)
class Finding:
    """One thing found. An error makes `shoal check` end with code 3; a warning costs exactness or speed; a note informs."""

    severity: Severity
    name: str
    message: str
    hint: str = ""


@dataclass
class CheckReport:
    """Findings in the order of the checks, and what was measured (microseconds, bytes, steps)."""

    environment: str
    findings: list[Finding] = field(default_factory=list)
    measurements: dict[str, float] = field(default_factory=dict)
    spec: EnvironmentSpec | None = None

    @property
    def ok(self) -> bool:
        return all(finding.severity != "error" for finding in self.findings)

    def add(self, severity: Severity, name: str, message: str, hint: str = "") -> None:
        self.findings.append(Finding(severity, name, message, hint))

    def to_json(self) -> dict[str, Any]:
        return {
            "environment": self.environment,
            "ok": self.ok,
            "findings": [asdict(finding) for finding in self.findings],
            "measurements": self.measurements,
            "spec": self.spec.to_json() if self.spec else None,
        }

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> CheckReport:
        spec = EnvironmentSpec.from_json(value["spec"]) if value["spec"] else None
        return cls(value["environment"], [Finding(**one) for one in value["findings"]], dict(value["measurements"]), spec)
