"""Conditional writes, and inputs apart from outputs."""

import pytest

from loraseg.batch.core.output import check_disjoint, publish
from loraseg.errors import ConfigError, StageError
from loraseg.storage import LocalStore


@pytest.fixture
def store(tmp_path):
    return LocalStore(tmp_path)


def test_the_first_write_creates_the_object(store):
    assert publish(store, "a", b"1", None, conflict="conflict")
    assert store.get("a") == b"1"


def test_equal_bytes_of_another_run_are_accepted(store):
    store.put("a", b"1")
    assert not publish(store, "a", b"1", None, conflict="conflict")


def test_other_bytes_of_another_run_are_an_error(store):
    store.put("a", b"1")
    with pytest.raises(StageError, match=r"^conflict$"):
        publish(store, "a", b"2", None, conflict="conflict")
    _, etag = store.get_with_etag("a")
    store.put("a", b"3")
    with pytest.raises(StageError, match=r"^conflict$"):
        publish(store, "a", b"2", etag, conflict="conflict")
    assert store.get("a") == b"3"


def test_the_version_of_the_etag_is_replaced(store):
    store.put("a", b"1")
    _, etag = store.get_with_etag("a")
    assert publish(store, "a", b"2", etag, conflict="conflict")
    assert store.get("a") == b"2"


def test_a_deleted_object_is_a_conflict(store):
    store.put("a", b"1")
    _, etag = store.get_with_etag("a")
    store.delete("a")
    with pytest.raises(StageError, match=r"^conflict$"):
        publish(store, "a", b"2", etag, conflict="conflict")


@pytest.mark.parametrize(("inputs", "output"), [("m", "m/out"), ("m/in", "m"), ("m", "m")])
def test_inputs_and_output_within_each_other_are_refused(inputs, output, tmp_path):
    with pytest.raises(ConfigError, match="masks and output must not lie within each other"):
        check_disjoint("masks", str(tmp_path / inputs), str(tmp_path / output))


def test_names_with_a_common_prefix_are_apart(tmp_path):
    check_disjoint("masks", str(tmp_path / "masks"), str(tmp_path / "masks2"))
