"""Rules for the words of the sources: plain technical English, no references to private notes."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = ("loraseg", "actors", "jobs")
SUFFIXES = {".py", ".md", ".j2", ".html", ".js", ".yaml", ".sh", ".toml", ""}

# Agents instead of objects, and phrases that are not plain English.
BANNED_WORDS = re.compile(
    r"(?<![a-z])(told|whoever|nobody|meanwhile|at[ _]hand|begun|so[ _]many|such[ _]as[ _]are)"
    r"(?![a-z])",
    re.IGNORECASE,
)
# Citations of documents that are not in the repository, such as "(methods b.5)" or "spec 05".
PRIVATE_CITATIONS = re.compile(
    r"\bmethods ([A-E]\b|[a-g]\.\d)|\b(spec|specification) \d"
    r"|\b(house|methods_\w+|architecture)\.md|\([A-Ea-g]\.\d+(, [A-Ea-g]\.\d+)*\)"
)


def source_files():
    files = [path for package in PACKAGES for path in (ROOT / package).rglob("*")]
    files += [ROOT / "README.md", ROOT / ".github/CONTRIBUTING.md", *(ROOT / ".ci").iterdir()]
    files += [ROOT / name for name in ("Makefile", "Dockerfile", "cluster.yaml", "pyproject.toml")]
    return [path for path in files if path.is_file() and path.suffix in SUFFIXES]


def lines_with(pattern, files):
    return [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()}"
        for path in files
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        if pattern.search(line)
    ]


def test_sources_use_plain_words():
    assert lines_with(BANNED_WORDS, source_files()) == []


def test_nothing_cites_documents_outside_the_repository():
    tests = [path for path in (ROOT / "tests").rglob("*.py") if path != Path(__file__)]
    assert lines_with(PRIVATE_CITATIONS, [*source_files(), *tests]) == []


@pytest.mark.parametrize(
    "line", ["def _told(x):", '"""Whoever reads it."""', "at_hand = 1", 'f"{so_many} images"']
)
def test_the_word_rule_finds_names_and_prose(line):
    assert BANNED_WORDS.search(line)


@pytest.mark.parametrize("line", ["stolid", "a retold story", "tolden", "soy many"])
def test_the_word_rule_matches_whole_words_only(line):
    assert not BANNED_WORDS.search(line)


@pytest.mark.parametrize(
    "line", ["(methods b.5, d.1)", "spec 05", "(A.7)", "(B.3, B.4)", "see house.md", "methods A.2"]
)
def test_the_citation_rule_finds_private_notes(line):
    assert PRIVATE_CITATIONS.search(line)


@pytest.mark.parametrize(
    "line", ["(SemLA, eq. 3)", "(MatchMask, sec. 3.2)", "two methods are", "methods a row has"]
)
def test_the_citation_rule_accepts_papers_and_prose(line):
    assert not PRIVATE_CITATIONS.search(line)


def missing_reference(dotted):
    """Return whether a name such as loraseg.fuse.mix.Mix has no module or no such member."""
    parts = dotted.split(".")
    for length in range(len(parts), 1, -1):
        path = ROOT.joinpath(*parts[:length])
        module = (
            path.with_suffix(".py") if path.with_suffix(".py").exists() else path / "__init__.py"
        )
        if module.exists():
            text = module.read_text(encoding="utf-8")
            return any(not re.search(rf"\b{name}\b", text) for name in parts[length:][:1])
        if path.is_dir():
            return False
    return True


def test_references_to_modules_and_members_exist():
    pattern = re.compile(r"\b(?:loraseg|actors|jobs)\.[a-z]\w*\.[A-Za-z_]\w*(?:\.[A-Za-z_]\w*)*")
    files = [*(ROOT / "tests").rglob("*.py"), *source_files()]
    files = [path for path in files if path != Path(__file__)]
    missing = {
        f"{path.relative_to(ROOT)}: {dotted}"
        for path in files
        for dotted in pattern.findall(path.read_text(encoding="utf-8"))
        if missing_reference(dotted)
    }
    assert missing == set()


@pytest.mark.parametrize(
    ("dotted", "missing"),
    [
        ("loraseg.fuse.mix", False),
        ("loraseg.fuse.mix.Mix", False),
        ("loraseg.fuse.mix.Max", True),
        ("loraseg.fusion.mix", True),
        ("loraseg.miniature.weights", False),
    ],
)
def test_the_reference_rule(dotted, missing):
    assert missing_reference(dotted) == missing
