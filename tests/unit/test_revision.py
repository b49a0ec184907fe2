import re

from loraseg.revision import code_revision


def test_revision_names_the_version_and_the_sources():
    assert re.fullmatch(r"[\w.]+\+src\.[0-9a-f]{12}", code_revision())
