import pytest

from loraseg.adapters.targets.layer_report_io import (
    find_layer_report,
    read_layer_report,
)
from loraseg.errors import ConfigError, IntegrityError
from loraseg.storage import open_parent_store
from tests.unit.probes.test_tables import layer, report


def test_reads_a_written_report(tmp_path):
    written = report(layer("a", 2.0), layer("b", 1.0))
    (tmp_path / "fog.json").write_bytes(written.to_bytes())
    for place in (str(tmp_path / "fog.json"), f"file://{tmp_path}/fog.json"):
        assert read_layer_report(place).to_bytes() == written.to_bytes()


def test_a_relative_path_starts_at_the_working_directory(tmp_path, monkeypatch):
    (tmp_path / "fog.json").write_bytes(report(layer("a", 2.0)).to_bytes())
    monkeypatch.chdir(tmp_path)
    assert read_layer_report("fog.json").top(1) == ("a",)


def test_a_missing_file(tmp_path):
    assert find_layer_report(str(tmp_path / "fog.json")) is None
    with pytest.raises(ConfigError, match=r"fog\.json: layer report does not exist"):
        read_layer_report(str(tmp_path / "fog.json"))


def test_a_file_of_another_format(tmp_path):
    (tmp_path / "fog.json").write_text("{}")
    with pytest.raises(IntegrityError, match=r"fog\.json: layer report: format"):
        read_layer_report(str(tmp_path / "fog.json"))


@pytest.mark.parametrize(
    "place", ["s3://bucket", "s3://bucket-only.json", "file:///", "", "x://y/z"]
)
def test_no_file(place):
    with pytest.raises(ConfigError):
        open_parent_store(place)
