"""Sources of weight files."""

import hashlib

import pytest

from loraseg.backbones.weights import resolve_weights
from loraseg.cache_dir import cache_dir
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
    """A fake S3 bucket "b" in a folder; it counts the reads."""
    monkeypatch.setenv("LORASEG_CACHE", str(tmp_path / "cache"))
    store = LocalStore(tmp_path / "bucket")
    store.put("models/m.pth", DATA)
    reads = []

    class CountingStore(LocalStore):
        def get(self, key):
            reads.append(key)
            return super().get(key)

    def open_store(uri):
        assert uri in ("s3://b/models", "s3://b")
        return CountingStore(tmp_path / "bucket" / uri.removeprefix("s3://b").strip("/"))

    monkeypatch.setattr("loraseg.storage.uri.open_store", open_store)
    return reads


@pytest.mark.parametrize("scheme", ["", "file://"])
def test_local_file(file, scheme):
    source = resolve_weights(f"{scheme}{file}")
    assert (source.name, source.path, source.digest) == (f"{scheme}{file}", file, DIGEST)


def test_pinned_digest_is_checked(file):
    assert resolve_weights(f"{file}#sha256={DIGEST}").name == str(file)
    with pytest.raises(IntegrityError, match=f"sha256 is {DIGEST}, pinned {'0' * 64}"):
        resolve_weights(f"{file}#sha256={'0' * 64}")


@pytest.mark.parametrize("spec", ["nowhere.pth", "file:///nowhere.pth", "", "."])
def test_a_missing_file_is_named(spec, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match="cannot read"):
        resolve_weights(spec)


def test_miniature_is_part_of_the_package():
    try:
        source = resolve_weights("miniature", miniature="clip")
    except ConfigError as error:
        assert "miniature/weights/clip.safetensors" in str(error)  # noqa: PT017 (not shipped yet)
    else:
        assert source.path.parts[-4:] == ("loraseg", "miniature", "weights", "clip.safetensors")


def test_objects_are_cached_by_digest(bucket):
    source = resolve_weights("s3://b/models/m.pth")
    assert source.path.read_bytes() == DATA
    assert source.path == cache_dir("weights") / DIGEST / "m.pth"
    assert (source.name, source.digest) == ("s3://b/models/m.pth", DIGEST)
    assert [path.name for path in source.path.parent.iterdir()] == ["m.pth"]
    resolve_weights("s3://b/models/m.pth")
    assert bucket == ["m.pth", "m.pth"]
    # The object may have changed, so only a pinned one is not read again.
    assert resolve_weights(f"s3://b/models/m.pth#sha256={DIGEST}").path == source.path
    assert len(bucket) == 2


def test_a_damaged_cache_entry_is_downloaded_again(bucket):
    spec = f"s3://b/models/m.pth#sha256={DIGEST}"
    path = resolve_weights(spec).path
    path.write_bytes(b"damaged")
    source = resolve_weights(spec)
    assert source.path.read_bytes() == DATA
    assert len(bucket) == 2


def test_a_missing_object(bucket):
    with pytest.raises(StoreError):
        resolve_weights("s3://b/models/none.pth")


@pytest.mark.parametrize("spec", ["s3://b", "s3://b/", "s3://"])
def test_bucket_without_key(bucket, spec):
    with pytest.raises(ConfigError, match="expected a file"):
        resolve_weights(spec)


@pytest.mark.parametrize("spec", ["hf:org", "hf:org/name", "hf:org/name:"])
def test_malformed_hub_specs_are_refused_before_any_request(spec):
    with pytest.raises(ConfigError, match="expected hf:org/name:file"):
        resolve_weights(spec)
