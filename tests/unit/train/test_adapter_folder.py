"""One call that trains an adapter without Ray."""

import pytest

from loraseg.adapters import load_adapter
from loraseg.errors import ConfigError
from loraseg.library import Library
from loraseg.storage import open_store
from loraseg.train import tasks
from loraseg.train.adapter_folder import train_adapter
from tests.unit.train.tiny_files import RECIPE, tiny_task


def options(task):
    return {"base": task.base, "encoder": task.encoder, "overrides": RECIPE}


def test_it_returns_and_writes_what_the_job_publishes(tmp_path):
    task = tiny_task(tmp_path)
    published = tasks.train_adapter(task)
    trained = train_adapter(task.data, output=tmp_path / "out", **options(task))
    assert trained.adapter.digest == published.digest
    assert trained.card.name == trained.adapter.name == "fog"
    assert trained.card.metrics == published.metrics
    assert trained.version is None
    store = open_store(str(tmp_path / "out"))
    written = {key: store.get(key) for key in store.list()}
    assert written == dict(trained.files)
    assert load_adapter(written).digest == published.digest


def test_it_publishes_once(tmp_path):
    task = tiny_task(tmp_path)
    library = tmp_path / "library"
    calls = [
        train_adapter(task.data, name="mist", library=library, **options(task)) for _ in range(2)
    ]
    assert [call.version for call in calls] == [1, 1]
    assert [entry.name for entry in Library(open_store(str(library))).entries()] == ["mist"]


def test_a_folder_that_is_no_name_needs_one(tmp_path):
    with pytest.raises(ConfigError, match="name: "):
        train_adapter(tmp_path / "No Name")
