from dataclasses import replace

import pytest
import torch

from loraseg.adapters.packed import pack
from loraseg.adapters.peft_io import load_adapter
from loraseg.errors import AdapterMismatchError, IntegrityError, StageError, StoreError
from loraseg.inference.adapter_loader import AdapterLoader
from loraseg.inference.adapter_ref import AdapterFailure, AdapterRef, AdapterUnavailableError
from loraseg.library import Library
from loraseg.storage import ObjectNotFoundError, open_store
from tests.unit.inference.tiny_service import blob_paths, switched_library
from tests.unit.tiny import random_pairs

WEIGHTS = "adapter_model.safetensors"


@pytest.fixture
def library(folder):
    return Library(open_store(str(folder)))


def make_loader(folder, base):
    store, library = switched_library(folder)
    return store, AdapterLoader({"main": library}, base)


def make_ref(library, name):
    return AdapterRef.from_entry("main", library.entry(name))


def test_returns_the_published_weights_under_the_published_name(folder, library, base):
    _, loader = make_loader(folder, base)
    files, _ = library.load("fog")
    known = pack(load_adapter(files, name="fog"))
    packed = loader(make_ref(library, "fog"))
    assert (packed.name, packed.digest, packed.base_digest) == ("fog", known.digest, base.digest)
    for shape, block in known.blocks.items():
        assert torch.equal(packed.blocks[shape].up, block.up)
        assert torch.equal(packed.blocks[shape].down, block.down)


def test_a_fetched_adapter_needs_no_store(folder, library, base):
    store, loader = make_loader(folder, base)
    loader(make_ref(library, "fog"))
    store.is_on = False
    assert loader(make_ref(library, "fog")).name == "fog"
    with pytest.raises(StoreError):
        loader(make_ref(library, "day"))


def test_an_older_generation_can_still_be_read(folder, library, base):
    _, loader = make_loader(folder, base)
    old = make_ref(library, "fog")
    files, card = library.load("day")
    library.publish("fog", files, replace(card, name="fog"))
    assert loader(old).digest == old.digest
    assert loader(make_ref(library, "fog")).digest == make_ref(library, "day").digest


@pytest.mark.parametrize("damage", ["flipped", "short", "other"])
def test_a_blob_with_other_bytes_is_refused(folder, library, base, damage):
    path = blob_paths(folder, library, "fog")[WEIGHTS]
    whole = path.read_bytes()
    other = blob_paths(folder, library, "day")[WEIGHTS].read_bytes()
    assert len(other) == len(whole)
    spoiled = {"flipped": whole[:-1] + bytes([whole[-1] ^ 1]), "short": whole[:-1], "other": other}
    path.write_bytes(spoiled[damage])
    _, loader = make_loader(folder, base)
    with pytest.raises(IntegrityError, match="damaged"):
        loader(make_ref(library, "fog"))
    assert loader(make_ref(library, "day")).name == "day"
    path.write_bytes(whole)
    assert loader(make_ref(library, "fog")).name == "fog"


def test_missing_blobs_and_records_are_refused(folder, library, base):
    _, loader = make_loader(folder, base)
    fog, day = make_ref(library, "fog"), make_ref(library, "day")
    blob_paths(folder, library, "fog")[WEIGHTS].unlink()
    (folder / "adapters" / "day" / "1.json").unlink()
    for ref in (fog, day):
        with pytest.raises(IntegrityError, match="missing"):
            loader(ref)


def test_an_adapter_of_another_base_is_refused_before_it_is_fetched(folder, library, base):
    store, loader = make_loader(folder, base)
    store.is_on = False
    ref = replace(make_ref(library, "fog"), base_digest="ff" * 32)
    with pytest.raises(AdapterMismatchError, match="'fog' was trained on base ffff"):
        loader(ref)


def test_undamaged_files_that_do_not_fit_the_model_are_refused(folder, library, base):
    from loraseg.adapters.peft_io import to_peft_files

    _, card = library.load("fog")
    pairs = random_pairs(base.model, 0)
    [first, *_] = pairs
    renamed = {f"{first}.beyond" if name == first else name: p for name, p in pairs.items()}
    cases = {
        "renamed": to_peft_files(renamed, base_digest=base.digest),
        "nonsense": {"adapter_config.json": b"{}", WEIGHTS: b"nonsense"},
    }
    _, loader = make_loader(folder, base)
    for name, files in cases.items():
        library.publish(name, files, replace(card, name=name))
        with pytest.raises(AdapterMismatchError, match=f"'{name}'"):
            loader(make_ref(library, name))


def test_an_unreachable_store_is_not_contacted_again_at_once(folder, library, base, monkeypatch):
    store, loader = make_loader(folder, base)
    store.is_on = False
    with pytest.raises(StoreError, match="refused"):
        loader(make_ref(library, "fog"))
    store.is_on = True
    with pytest.raises(StoreError, match="'main': its store could not be reached a moment ago"):
        loader(make_ref(library, "fog"))
    monkeypatch.setattr(AdapterLoader, "CIRCUIT_OPEN_S", 0.0)
    _, loader = make_loader(folder, base)
    assert loader(make_ref(library, "fog")).name == "fog"


def test_reasons_for_clients_contain_no_locations(library):
    ref = make_ref(library, "fog")
    caused = IntegrityError("s3://bucket/key is missing")
    caused.__cause__ = ObjectNotFoundError("s3://bucket/key")
    errors = {
        "unreachable": StoreError("s3://bucket: connection refused"),
        "missing": caused,
        "damaged": IntegrityError("s3://bucket/key is damaged"),
        "unfit": AdapterMismatchError("module 'x' of /home/me"),
    }
    for kind, error in errors.items():
        failure = AdapterFailure.from_error(ref, error)
        assert (failure.name, failure.version, failure.digest) == (ref.name, 1, ref.digest)
        assert failure.kind == kind
        assert not {"s3://", "/home", "bucket"} & set(failure.reason.split())
    assert len({AdapterFailure.from_error(ref, error).reason for error in errors.values()}) == 4


def test_the_error_can_be_pickled(library):
    import pickle

    failures = tuple(
        AdapterFailure.from_error(make_ref(library, n), StoreError("x")) for n in ("fog", "day")
    )
    error = pickle.loads(pickle.dumps(AdapterUnavailableError(failures)))
    assert error.failures == failures
    assert isinstance(error, StageError)
    assert "fog version 1: the store cannot be reached; day version 1" in str(error)
