"""Rules for the source tree that no linter checks."""

import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = ("loraseg", "actors", "jobs", "tests")


def python_files():
    return [path for package in PACKAGES for path in (ROOT / package).rglob("*.py")]


def test_no_file_is_longer_than_400_lines():
    lengths = {path: len(path.read_text().splitlines()) for path in python_files()}
    assert {str(path): n for path, n in lengths.items() if n > 400} == {}


def test_jobs_are_thin():
    # Every module except the one that generates grafana_dashboard.json is an entry point.
    jobs = [path for path in ROOT.glob("jobs/*.py") if path.name != "grafana.py"]
    lengths = {path.name: len(path.read_text().splitlines()) for path in jobs}
    assert {name: n for name, n in lengths.items() if n >= 80} == {}


def test_ignore_lines_are_anchored():
    # Ray does not upload files that .gitignore names; an unanchored "data/" once removed
    # loraseg/data from every worker.
    lines = (ROOT / ".gitignore").read_text().splitlines()
    folders = [line for line in lines if line.rstrip().endswith("/") and line[0] != "#"]
    assert [line for line in folders if not line.startswith("/") and line != "__pycache__/"] == []


def test_no_package_module_is_ignored_by_git():
    modules = [str(p.relative_to(ROOT)) for p in python_files() if "__pycache__" not in p.parts]
    result = subprocess.run(
        ["git", "check-ignore", "--no-index", *modules], cwd=ROOT, capture_output=True, text=True
    )
    if result.returncode == 128:
        pytest.skip("not a git checkout")
    assert result.stdout == ""
