"""A browser, the endpoint, and what a page must never do."""

import hashlib
import re
import shutil
from urllib.parse import urlsplit

import pytest
from playwright.sync_api import expect, sync_playwright

from loraseg.serving.config import ServiceConfig
from tests.e2e.page_server import publish_random, serving

_PATIENCE_MS = 120_000  # browser, server and models may share two busy cores
TOKEN = "open-sesame-" + "x" * 20


@pytest.fixture(scope="module")
def browser():
    path = shutil.which("chromium") or shutil.which("chromium-browser")
    if path is None:
        pytest.skip("no chromium on the PATH")
    expect.set_options(timeout=_PATIENCE_MS)
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=path, args=["--disable-gpu"])
        yield chromium
        chromium.close()


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    return publish_random(tmp_path_factory.mktemp("library"))


@pytest.fixture(scope="module")
def endpoint(library):
    with serving(ServiceConfig(libraries={"main": library})) as url:
        yield url


@pytest.fixture(scope="module")
def locked_endpoint(library, tmp_path_factory):
    """An endpoint that wants ``TOKEN``."""
    book = tmp_path_factory.mktemp("tokens") / "tokens.yaml"
    digest = hashlib.sha256(TOKEN.encode()).hexdigest()
    book.write_text(f"tokens:\n- {{name: tester, sha256: {digest}}}\n")
    with serving(ServiceConfig(libraries={"main": library}, tokens=str(book))) as url:
        yield url


@pytest.fixture
def visit(browser, endpoint):
    """Open the page; at the end, no other host was asked and no script or policy failed."""
    contexts, asked, heard, hosts = [], [], [], set()

    def open_page(url=endpoint, **options):
        usual = {"viewport": {"width": 1280, "height": 860}, "reduced_motion": "reduce"}
        context = browser.new_context(**{**usual, **options})
        context.set_default_timeout(_PATIENCE_MS)
        contexts.append(context)
        hosts.add(urlsplit(url).netloc)
        context.on("request", lambda request: asked.append(request.url))
        context.on("weberror", lambda error: heard.append(str(error.error)))
        context.on("console", lambda line: heard.append(line.text) if _is_bad(line) else None)
        page = context.new_page()
        page.goto(url)
        return page

    yield open_page
    for context in contexts:
        context.close()
    others = [url for url in asked if not re.match("blob:|data:", url)]
    assert {urlsplit(url).netloc for url in others} <= hosts
    assert heard == []


def _is_bad(line):
    # Every answer above 399 is noted by the browser itself; the page puts it in words.
    return line.type in ("error", "warning") and not line.text.startswith("Failed to load resource")
