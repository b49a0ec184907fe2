"""Finding and fetching weight files."""

import hashlib

import pytest

from loraseg.backbones import weights
from loraseg.backbones.weights import resolve_weights, weights_cache_dir
from loraseg.errors import ConfigError, IntegrityError, StoreError
from loraseg.storage import LocalStore

DATA = b"weights"
DIGEST = hashlib.sha256(DATA).hexdigest()


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_bytes(DATA)
    return path


@pytest.fixture
def bucket(tmp_path, monkeypatch):
    """An S3 bucket "b" with a network in a folder; counts the reads."""
    monkeypatch.setenv("LORASEG_CACHE", str(tmp_path / "cache"))
    store = LocalStore(tmp_path / "bucket")
    store.put("models/m.pth", DATA)
    reads = []

    class Counting:
        def __init__(self, prefix):
            self.prefix = prefix

        def get(self, key):
            reads.append(key)
            return store.get(f"{self.prefix}{key}")

    def open_store(uri):
        assert uri in ("s3://b/models", "s3://b")
        return Counting("models/" if uri.endswith("models") else "")

    monkeypatch.setattr(weights, "open_store", open_store)
    return reads


@pytest.mark.parametrize("scheme", ["", "file://"])
def test_local_file(file, scheme):
    found = resolve_weights(f"{scheme}{file}")
    assert (found.name, found.path, found.digest) == (f"{scheme}{file}", file, DIGEST)


def test_pinned_digest_is_checked(file):
    assert resolve_weights(f"{file}#sha256={DIGEST}").name == str(file)
    with pytest.raises(IntegrityError, match=f"sha256 is {DIGEST}, pinned {'0' * 64}"):
        resolve_weights(f"{file}#sha256={'0' * 64}")


@pytest.mark.parametrize("spec", ["nowhere.pth", "file:///nowhere.pth", "", "."])
def test_absent_file_is_named(spec, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match="cannot read"):
        resolve_weights(spec)


def test_miniature_lies_in_the_package():
    try:
        found = resolve_weights("miniature", miniature="clip")
    except ConfigError as error:
        assert "miniature/weights/clip.safetensors" in str(error)  # noqa: PT017 (not shipped yet)
    else:
        assert found.path.parts[-4:] == ("loraseg", "miniature", "weights", "clip.safetensors")


def test_object_is_kept_by_digest(bucket):
    found = resolve_weights("s3://b/models/m.pth")
    assert found.path.read_bytes() == DATA
    assert found.path == weights_cache_dir() / DIGEST / "m.pth"
    assert (found.name, found.digest) == ("s3://b/models/m.pth", DIGEST)
    assert [path.name for path in found.path.parent.iterdir()] == ["m.pth"]
    resolve_weights("s3://b/models/m.pth")
    assert bucket == ["m.pth", "m.pth"]
    # The object may have changed since, so only a pinned one is not read again.
    assert resolve_weights(f"s3://b/models/m.pth#sha256={DIGEST}").path == found.path
    assert len(bucket) == 2


def test_a_damaged_cache_is_not_trusted(bucket):
    spec = f"s3://b/models/m.pth#sha256={DIGEST}"
    path = resolve_weights(spec).path
    path.write_bytes(b"damaged")
    found = resolve_weights(spec)
    assert found.path.read_bytes() == DATA
    assert len(bucket) == 2


def test_absent_object(bucket):
    with pytest.raises(StoreError):
        resolve_weights("s3://b/models/none.pth")


@pytest.mark.parametrize("spec", ["s3://b", "s3://b/", "s3://"])
def test_bucket_without_key(bucket, spec):
    with pytest.raises(ConfigError, match="expected s3://bucket/key"):
        resolve_weights(spec)


@pytest.mark.parametrize("spec", ["hf:org", "hf:org/name", "hf:org/name:"])
def test_hub_spec_is_checked_before_anything_is_asked(spec):
    with pytest.raises(ConfigError, match="expected hf:org/name:file"):
        resolve_weights(spec)
