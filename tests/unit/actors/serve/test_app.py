"""The Serve application, its config and dashboard; nothing is started."""

import json
import math
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from ray.serve.schema import ServeDeploySchema

import jobs.serve as job
from actors.serve import metrics
from actors.serve.app import build_app
from actors.serve.autoscaling import images_in_flight_policy
from jobs.grafana import dashboard
from loraseg import config as configuration
from loraseg.errors import ConfigError
from loraseg.serving.config import ServiceConfig

JOBS = Path(job.__file__).parent


def deployments(app):
    """The deployments by name: the ingress and those bound to it."""
    bound = app._bound_deployment
    nodes = [bound, *(arg for arg in bound.init_args if hasattr(arg, "_bound_deployment"))]
    found = [getattr(node, "_bound_deployment", node) for node in nodes]
    return {deployment.name: deployment for deployment in found}


def config_of(app):
    return app._bound_deployment.init_args[0]


def test_the_config_can_be_an_object_plain_values_or_text(tmp_path):
    file = tmp_path / "service.yaml"
    file.write_text("libraries: {main: s3://bucket/adapters}\nbatch: 4\n")
    variants = (
        ServiceConfig(libraries={"main": "s3://bucket/adapters"}, batch=2),
        {"libraries": {"main": "s3://bucket/adapters"}, "batch": 2},
        {"libraries.main": "s3://bucket/adapters", "batch": "2"},
        {"config": str(file), "batch": "2"},
    )
    assert len({configuration.digest(config_of(build_app(args))) for args in variants}) == 1


def test_config_errors_are_raised_before_start():
    with pytest.raises(ConfigError, match="did you mean 'batch'"):
        build_app({"libraries.main": "s3://bucket/adapters", "bach": "2"})
    with pytest.raises(ConfigError, match="libraries"):
        build_app({})


def test_paths_are_made_absolute(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = config_of(build_app({"libraries.main": "library", "tokens": "tokens.yaml"}))
    assert config.libraries == {"main": str(tmp_path / "library")}
    assert config.tokens == str(tmp_path / "tokens.yaml")


def test_resources_and_scaling_follow_the_config(monkeypatch):
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "not-to-be-logged")
    app = build_app(
        {
            "libraries": {"main": "s3://bucket/adapters"},
            "gateway": {"max_replicas": 3, "target_ongoing": 7},
            "segmenter": {"cpus": 2, "gpus": 0.5, "node": "server", "max_replicas": 4},
        }
    )
    found = deployments(app)
    options = found["Segmenter"].ray_actor_options
    assert (options["num_cpus"], options["num_gpus"]) == (2, 0.5)
    assert options["resources"] == {"server": 0.001}
    assert options["runtime_env"] == {"env_vars": {"OMP_NUM_THREADS": "2"}}
    assert found["Retrieval"].num_replicas == 1
    scaling = found["Gateway"]._deployment_config.autoscaling_config
    assert (scaling.min_replicas, scaling.max_replicas) == (1, 3)
    assert scaling.get_target_ongoing_requests() == 7
    assert "not-to-be-logged" not in repr(found["Segmenter"].init_args)


def test_segmenters_are_scaled_by_images_not_by_calls():
    context = SimpleNamespace(
        aggregated_metrics={"images": {"a": 12.0, "b": 4.0}},
        total_queued_requests=2,
        config=SimpleNamespace(get_target_ongoing_requests=lambda: 4.0),
    )
    replicas, _ = images_in_flight_policy(context)
    assert math.ceil(replicas) == 5


def test_serve_build_needs_a_config_file(monkeypatch, tmp_path):
    import actors.service as module

    monkeypatch.delenv("LORASEG_SERVICE", raising=False)
    with pytest.raises(ConfigError, match="LORASEG_SERVICE"):
        _ = module.app
    file = tmp_path / "service.yaml"
    file.write_text("libraries: {main: s3://bucket/adapters}\n")
    monkeypatch.setenv("LORASEG_SERVICE", str(file))
    assert set(deployments(module.app)) == {"Gateway", "Retrieval", "Segmenter"}


def test_the_rayservice_has_a_valid_deployment_of_the_app():
    resource = yaml.safe_load((JOBS / "rayservice.yaml").read_text())
    schema = ServeDeploySchema.model_validate(yaml.safe_load(resource["spec"]["serveConfigV2"]))
    [application] = schema.applications
    assert application.import_path == "actors.service:build_app"
    build_app(application.args)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "10.0.0.7"])
def test_other_interfaces_require_tokens(host):
    with pytest.raises(ConfigError, match="token"):
        job.main(job.Config(libraries={"main": "s3://bucket/adapters"}, host=host))


def test_the_default_library_is_that_of_the_quickstart_if_it_exists(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match="libraries"):
        job.Config()
    (tmp_path / "runs" / "quickstart" / "library").mkdir(parents=True)
    assert job.Config().libraries == {"main": "runs/quickstart/library"}


def test_the_dashboard_file_is_up_to_date_and_its_metrics_exist():
    written = json.loads((JOBS / "grafana_dashboard.json").read_text())
    assert written == dashboard()
    source = Path(metrics.__file__).read_text()
    names = set(re.findall(r"ray_(loraseg_[a-z_]+)", json.dumps(written)))
    assert len(names) > 12
    for name in names:
        bare = re.sub(r"_(total|bucket|sum|count)$", "", name)
        suffix = bare.removeprefix("loraseg_adapter_")
        assert f'"{bare}"' in source or f'"{suffix}"' in source, name
