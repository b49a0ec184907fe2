"""A browser and an endpoint; each page is checked for errors and foreign requests."""

import hashlib
import re
import shutil
from urllib.parse import urlsplit

import pytest
from playwright.sync_api import expect, sync_playwright

from loraseg.serving.config import ServiceConfig
from tests.e2e.page_server import publish_random, serving

_TIMEOUT_MS = 120_000  # browser, server and models may share two busy cores
TOKEN = "open-sesame-" + "x" * 20


@pytest.fixture(scope="module")
def browser():
    path = shutil.which("chromium") or shutil.which("chromium-browser")
    if path is None:
        pytest.skip("no chromium on the PATH")
    expect.set_options(timeout=_TIMEOUT_MS)
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
    """An endpoint that requires ``TOKEN``."""
    token_file = tmp_path_factory.mktemp("tokens") / "tokens.yaml"
    digest = hashlib.sha256(TOKEN.encode()).hexdigest()
    token_file.write_text(f"tokens:\n- {{name: tester, sha256: {digest}}}\n")
    with serving(ServiceConfig(libraries={"main": library}, tokens=str(token_file))) as url:
        yield url


@pytest.fixture
def visit(browser, endpoint):
    """Opens the page; afterwards, checks that it contacted no other host and had no errors."""
    contexts, urls, errors, hosts = [], [], [], set()

    def open_page(url=endpoint, **options):
        defaults = {"viewport": {"width": 1280, "height": 860}, "reduced_motion": "reduce"}
        context = browser.new_context(**{**defaults, **options})
        context.set_default_timeout(_TIMEOUT_MS)
        contexts.append(context)
        hosts.add(urlsplit(url).netloc)
        context.on("request", lambda request: urls.append(request.url))
        context.on("weberror", lambda error: errors.append(str(error.error)))
        context.on("console", lambda line: errors.append(line.text) if _is_error(line) else None)
        page = context.new_page()
        page.goto(url)
        return page

    yield open_page
    for context in contexts:
        context.close()
    others = [url for url in urls if not re.match("blob:|data:", url)]
    assert {urlsplit(url).netloc for url in others} <= hosts
    assert errors == []


def _is_error(line):
    # The browser logs each response above 399, which the page handles.
    return line.type in ("error", "warning") and not line.text.startswith("Failed to load resource")
