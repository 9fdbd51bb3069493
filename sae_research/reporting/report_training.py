"""The report's section on training: what curves and held-out figures show to be wrong, and what to change."""

from __future__ import annotations

from typing import Any

from sae_research.reporting.run import Run
from sae_research.reporting.tables import markdown, number


def training(run: Run) -> str:
    """Findings of the train stage as a table; empty where nothing was trained or the stage is older than they."""
    diagnosed = run.training.get("diagnose")
    if not diagnosed:
        return ""
    rows = [_row("text", finding) for finding in diagnosed.get("text", [])]
    rows += [_row(f"`{name}`", finding) for name, findings in diagnosed["saes"].items() for finding in findings]
    healthy = [f"`{name}`" for name, findings in diagnosed["saes"].items() if not findings]
    lines = ["## What the training shows", ""]
    if rows:
        lines += [markdown(["SAE", "Finding", "Figure", "Limit", "Change"], rows, left=2), ""]
    if healthy:
        lines.append(f"Nothing stands out for {', '.join(healthy)}.")
    lines.append("Rules and limits: [docs/training.md](docs/training.md).")
    return "\n".join(lines)


def _row(name: str, finding: dict[str, Any]) -> list[str]:
    text = finding["says"].replace("|", "\\|")
    return [name, text, f"{finding['figure']} {number(finding['value'])}", number(finding["limit"]),
            f"`{finding['change'].partition(':')[0]}`:{finding['change'].partition(':')[2]}"]
