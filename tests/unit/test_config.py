from dataclasses import dataclass, field
from typing import Literal

import pytest

from loraseg import config
from loraseg.errors import ConfigError


@dataclass(frozen=True, kw_only=True, slots=True)
class Inner:
    steps: int = 3
    mode: Literal["a", "b"] = "a"

    def __post_init__(self):
        if self.steps < 1:
            raise ConfigError(f"steps: got {self.steps}, expected at least 1")


@dataclass(frozen=True, kw_only=True, slots=True)
class Outer:
    name: str
    inner: Inner = field(default_factory=Inner)
    many: tuple[Inner, ...] = ()
    maybe: Inner | None = None
    dry_run: bool = False


def test_file_and_overrides_build_nested_dataclasses(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text("name: rain\ninner: {steps: 5}\nmany: [{steps: 2}, {mode: b}]\n")
    loaded = config.load(Outer, path, ["inner.mode=b", "maybe.steps=7"])
    assert loaded == Outer(
        name="rain",
        inner=Inner(steps=5, mode="b"),
        many=(Inner(steps=2), Inner(mode="b")),
        maybe=Inner(steps=7),
    )


def test_plain_values_round_trip_and_digest_ignores_key_order():
    built = config.build(Outer, {"name": "x", "many": [{"steps": 4}]})
    assert config.build(Outer, config.to_dict(built)) == built
    swapped = config.build(Outer, {"many": [{"steps": 4}], "name": "x"})
    assert config.digest(swapped) == config.digest(built)
    assert config.digest(config.build(Outer, {"name": "y"})) != config.digest(built)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["name=x", "inner.step=5"], r"unknown key 'inner.step'; did you mean 'inner.steps'\?"),
        (["name=x", "many=[{stepz: 2}]"], r"unknown key 'many.0.stepz'; did you mean"),
        (["name=x", "maybe.stepz=2"], "unknown key 'maybe.stepz'"),
        (["name=x", "inner.steps=0"], "steps: got 0, expected at least 1"),
        (["name=x", "inner.mode=c"], r"inner.mode: .*'a' or 'b' \(got 'c'\)"),
        (["name=x", "inner.steps=many"], "inner.steps: .*integer"),
        ([], "missing key 'name'"),
        (["name"], "expected key=value"),
        (["name=x", "name.y=1"], "'name' is not a mapping"),
        (["name=[x"], "not YAML"),
    ],
)
def test_errors_name_the_key(overrides, message):
    with pytest.raises(ConfigError, match=message):
        config.load(Outer, None, overrides)


def test_a_field_that_is_omitted_at_its_default_does_not_change_the_digest():
    @dataclass(frozen=True, kw_only=True)
    class Old:
        rank: int = 4

    @dataclass(frozen=True, kw_only=True)
    class New(Old):
        init: str = field(default="lora", metadata=config.OMITTED_AT_DEFAULT)

    assert config.digest(New()) == config.digest(Old())
    assert config.to_dict(New(init="other")) == {"rank": 4, "init": "other"}
    for value in (New(), New(init="other")):
        assert config.build(New, config.to_dict(value)) == value


def test_errors_name_the_config_file(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text("- a\n- b\n")
    with pytest.raises(ConfigError, match=r"c\.yaml: expected a mapping at the top, got list"):
        config.load(Outer, path)
    with pytest.raises(ConfigError, match="cannot read the config file"):
        config.load(Outer, tmp_path / "absent.yaml")


@pytest.mark.parametrize(
    ("argv", "status"), [(["name=x", "--dry-run"], 0), (["nam=x"], 2), (["name=stop"], 1)]
)
def test_main_exits_with_the_jobs_status(argv, status, capsys):
    def run(settings: Outer) -> int:
        return 1 if settings.name == "stop" else int(not settings.dry_run)

    with pytest.raises(SystemExit) as stop:
        config.main(run, Outer, argv)
    assert stop.value.code == status
    assert ("did you mean 'name'" in capsys.readouterr().err) == (status == 2)


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    outer: Outer = field(metadata=config.INLINED)
    workers: int = 2


def test_keys_of_an_inlined_field_are_keys_of_the_config():
    built = config.build(Job, {"name": "a", "inner": {"steps": 5}, "workers": 3})
    assert built == Job(outer=Outer(name="a", inner=Inner(steps=5)), workers=3)
    assert config.to_dict(built) == {**config.to_dict(built.outer), "workers": 3}
    assert config.load(Job, None, ["name=a", "inner.steps=5", "workers=3"]) == built


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({}, "^config: missing key 'name'$"),
        ({"name": "x", "worker": 1}, r"unknown key 'worker'; did you mean 'workers'.*known: name"),
        ({"name": "x", "outer": {}}, "unknown key 'outer'"),
        ({"name": "x", "inner": {"steps": 0}}, "^config: inner: steps: got 0"),
        ({"name": "x", "workers": "many"}, "^config: workers: .*integer"),
    ],
)
def test_errors_in_inlined_fields_name_the_flat_key(values, message):
    with pytest.raises(ConfigError, match=message):
        config.build(Job, values)


def test_switches_and_help_include_inlined_fields(capsys):
    with pytest.raises(SystemExit) as stop:
        config.main(lambda job: int(not job.outer.dry_run), Job, ["name=x", "--dry-run"])
    assert stop.value.code == 0
    with pytest.raises(SystemExit):
        config.main(lambda job: 0, Job, ["--help"])
    output = capsys.readouterr().out
    assert "  name: str (required)" in output
    assert "  workers: int = 2" in output
