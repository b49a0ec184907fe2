import pytest


@pytest.fixture(params=["file", "moto", pytest.param("durable", marks=pytest.mark.durable)])
def store_uri(request, tmp_path):
    """The URI of an empty store of each kind, below a prefix with a blank in it."""
    if request.param == "file":
        return (tmp_path / "a store").as_uri()
    space = request.getfixturevalue("s3_env" if request.param == "moto" else "durable_env")
    return f"{space.uri}/a store"


@pytest.fixture
def on_s3(store_uri):
    return store_uri.startswith("s3://")
