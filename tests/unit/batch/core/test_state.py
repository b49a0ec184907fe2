"""Run states: created once, compared with the settings of later runs."""

import dataclasses
import json
from dataclasses import dataclass, field

import pytest

from loraseg.batch.core import state as core_state
from loraseg.batch.core.state import RunState, RunStateFormat, create_once, open_or_create
from loraseg.errors import ConfigError, IntegrityError
from loraseg.storage import LocalStore


@dataclass(frozen=True, kw_only=True)
class Sampling:
    steps: int = 2
    images: int = 3


@dataclass(frozen=True, kw_only=True)
class Config:
    output: str
    sampling: Sampling = field(default_factory=Sampling)


@dataclass(frozen=True, kw_only=True)
class Models:
    base: str


FORMAT = RunStateFormat(
    key="state.json",
    config=Config,
    models=Models,
    settings_key="settings",
    has_classes=True,
    unstored=("output",),
)
CONFIG = Config(output="out")
REQUESTED = RunState(
    config=CONFIG, classes=("road", "größe"), threads=1, device="cpu", models=None, code="c1"
)


@pytest.fixture
def store(tmp_path):
    return LocalStore(tmp_path)


def open_state(store, *, mutable=(), **changes):
    requested = dataclasses.replace(REQUESTED, **changes)
    return open_or_create(
        FORMAT,
        store,
        requested,
        lambda: (requested.config, Models(base="b")),
        lambda settings: {**settings, "output": requested.config.output},
        mutable,
    )


def test_the_first_run_records_the_state(store):
    state = open_state(store)
    assert state.models == Models(base="b")
    assert json.loads(store.get("state.json")) == {
        "format": 1,
        "settings": {"sampling": {"steps": 2, "images": 3}},
        "classes": ["road", "größe"],
        "threads": 1,
        "device": "cpu",
        "facts": {"base": "b"},
        "code": "c1",
    }
    moved = dataclasses.replace(CONFIG, output="moved")
    assert open_state(store, config=moved) == dataclasses.replace(state, config=moved)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"threads": 2}, "threads was 1 and is 2"),
        ({"device": "gpu"}, 'device was "cpu" and is "gpu"'),
        ({"classes": ("road",)}, "classes was"),
        ({"config": Config(output="out", sampling=Sampling(steps=4))}, "sampling.steps was 2"),
        ({"config": Config(output="out", sampling=Sampling(images=4))}, "sampling.images was 3"),
    ],
)
def test_other_settings_are_errors(changes, message, store):
    open_state(store)
    with pytest.raises(ConfigError, match=f"created with other settings: {message}"):
        open_state(store, **changes)


def test_mutable_settings_may_differ(store):
    open_state(store)
    config = Config(output="out", sampling=Sampling(images=4))
    open_state(store, config=config, mutable=("sampling.images",))


def test_another_code_revision_is_logged(store, caplog, monkeypatch):
    open_state(store)
    monkeypatch.setattr(core_state, "code_revision", lambda: "c1")
    open_state(store)
    assert caplog.messages == []
    monkeypatch.setattr(core_state, "code_revision", lambda: "c2")
    open_state(store)
    assert caplog.messages == [f"{store.uri} was created by another code revision (c1)"]


@pytest.mark.parametrize("values", [{"format": 2}, {"threads": 0}, {"classes": 5}, {"facts": {}}])
def test_a_damaged_state_is_an_error(values, store):
    open_state(store)
    stored = json.loads(store.get("state.json"))
    store.put("state.json", json.dumps({**stored, **values}).encode())
    with pytest.raises(IntegrityError, match=r"state\.json"):
        open_state(store)


def test_of_two_runs_one_creates_the_value(store):
    def read():
        return store.get("key") if store.exists("key") else None

    def create():
        store.put("key", b"other")  # another run, between read and write
        return b"own"

    assert create_once(store, "key", read, create, bytes) == (b"other", False)
    store.delete("key")
    assert create_once(store, "key", read, lambda: b"own", bytes) == (b"own", True)
    assert create_once(store, "key", read, create, bytes) == (b"own", False)


def test_a_value_that_is_deleted_at_the_start_is_an_error(store):
    store.put("key", b"other")
    with pytest.raises(IntegrityError, match="key was deleted while this run started"):
        create_once(store, "key", lambda: None, lambda: b"own", bytes)
