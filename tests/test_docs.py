"""The documents point at what there is."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from shoal.cli.main import cli
from shoal.engines.ray_security import check_cluster

ROOT = Path(__file__).parents[1]
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "CHANGELOG.md",
    *sorted((ROOT / "docs").glob("*.md")),
    ROOT / "examples/README.md",
]


def anchors(page: Path) -> set[str]:
    titles = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.M)
    return {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_leads_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        if target.startswith("http"):
            continue
        name, _, anchor = target.partition("#")
        file = (page.parent / name).resolve() if name else page
        assert file.exists(), target
        assert not anchor or anchor in anchors(file), target


def test_every_command_is_in_the_readme() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert all(f"shoal {name}" in text for name in cli.commands)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_command_line_in_the_documents_is_one(page: Path) -> None:
    for name in re.findall(r"^(?:\.venv/bin/)?shoal (\w+)", page.read_text(encoding="utf-8"), re.M):
        assert name in cli.commands, f"shoal {name}"


def test_a_cluster_that_is_started_as_the_guide_says_is_joined_without_a_warning(tmp_path: Path) -> None:
    """The commands before `ray start`, as they stand there."""
    section = (ROOT / "docs/guide.md").read_text(encoding="utf-8").partition("\n## On a cluster\n")[2].partition("\n### ")[0]
    blocks = re.findall(r"^```sh\n(.*?)^```", section, re.M | re.S)
    before = [block for block in blocks if re.search(r"^(shoal deploy|export) ", block, re.M)]
    assert len(before) == 2
    show = f"{sys.executable} -c 'import json, os; print(json.dumps(dict(os.environ)))'"
    script = "\n".join(["set -e", f'shoal() {{ {sys.executable} -m shoal.cli "$@" >&2; }}', *before, show])
    around = {**{name: value for name, value in os.environ.items() if not name.startswith("RAY_")}, "HOME": str(tmp_path)}
    done = subprocess.run(["sh", "-c", script], env=around, capture_output=True, text=True, timeout=300, check=True)
    environment = json.loads(done.stdout)
    assert check_cluster(environment, allow_insecure=False, ask=lambda: True) == []
    assert all(Path(environment[f"RAY_TLS_{name}"]).is_file() for name in ("SERVER_CERT", "SERVER_KEY", "CA_CERT"))
