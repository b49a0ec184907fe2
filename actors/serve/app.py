"""The endpoint on Ray Serve: HTTP -> gateway -> retrieval -> gateway -> segmenter -> gateway.

:mod:`jobs.serve` runs it in the foreground; so does
``serve run actors.service:build_app libraries.main=s3://bucket/adapters``. ``serve deploy`` and a
RayService take a YAML with ``import_path: actors.service:build_app`` and the config as ``args``
(``jobs/rayservice.yaml``). ``LORASEG_SERVICE=service.yaml serve build actors.service:app`` writes
one with every option of every deployment.
"""

import json
import os
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from ray import serve
from ray.serve import Application

from actors.resources import StorageCredentials
from actors.serve.deployments import Gateway, Retrieval, Segmenter
from actors.serve.logs import LOGGING
from loraseg import config as configuration
from loraseg.backbones.weights import absolute_spec
from loraseg.errors import ConfigError
from loraseg.serving.config import ReplicaConfig, ServiceConfig
from loraseg.storage import absolute_uri

__all__ = ["build_app"]

# The API itself limits requests and explains why; this limit is a backstop.
_MAX_GATEWAY_REQUESTS = 1024
_RETRY_AFTER_S = 1.0
# Limits calls; the gateways limit images.
_MAX_STAGE_CALLS = 1024
_SCALING_POLICY = "actors.serve.autoscaling:images_in_flight_policy"
_HEALTH_PERIOD_S = 5.0
_HEALTH_TIMEOUT_S = 30.0
_UPSCALE_DELAY_S = 5.0
_DOWNSCALE_DELAY_S = 300.0


def build_app(args: ServiceConfig | Mapping[str, Any]) -> Application:
    """Build the application.

    Args:
        args: The config, or its fields as in ``serve run`` and Serve's YAML: plain values or
            text, nested or with dotted names (``limits.images=16``). The field ``config`` names
            a YAML file, whose values the others override.

    Raises:
        ConfigError: A field is unknown, missing, mistyped or out of range.
    """
    config = _with_absolute_uris(args if isinstance(args, ServiceConfig) else _parse_args(args))
    # An argument of the deployments, since Ray writes a runtime_env into log files.
    access = StorageCredentials.from_environment()
    retrieval = _deployment(Retrieval, config.retrieval, config).bind(config, access)
    segmenter = _deployment(Segmenter, config.segmenter, config, policy=_SCALING_POLICY).bind(
        config, access
    )
    gateway = _deployment(
        serve.ingress()(Gateway),
        config.gateway,
        config,
        max_ongoing_requests=_MAX_GATEWAY_REQUESTS,
        max_queued_requests=_MAX_GATEWAY_REQUESTS,
        backpressure_config={"status_code": 503, "retry_after_s": _RETRY_AFTER_S},
    )
    return gateway.bind(config, access, retrieval, segmenter)


def __getattr__(name: str) -> Application:
    """Return ``app`` of the config file LORASEG_SERVICE, since `serve build` has no arguments."""
    if name != "app":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    path = os.environ.get("LORASEG_SERVICE")
    if path is None:
        raise ConfigError("LORASEG_SERVICE is not set; expected the path of a config file")
    return build_app({"config": path})


def _deployment(
    cls: Any,
    replicas: ReplicaConfig,
    config: ServiceConfig,
    *,
    policy: str | None = None,
    **more: Any,
) -> Any:
    threads = str(max(1, int(replicas.cpus)))
    options: dict[str, Any] = {
        "num_cpus": replicas.cpus,
        "num_gpus": replicas.gpus,
        "resources": {} if replicas.node is None else {replicas.node: 0.001},
        "runtime_env": {"env_vars": {"OMP_NUM_THREADS": threads}},
    }
    deploy: Any = serve.deployment
    return deploy(
        name=cls.__name__,
        ray_actor_options=options,
        health_check_period_s=_HEALTH_PERIOD_S,
        health_check_timeout_s=_HEALTH_TIMEOUT_S,
        graceful_shutdown_timeout_s=config.limits.request_timeout_s,
        logging_config=LOGGING,
        **{"max_ongoing_requests": _MAX_STAGE_CALLS, **_scaling_options(replicas, policy), **more},
    )(cls)


def _scaling_options(replicas: ReplicaConfig, policy: str | None) -> dict[str, Any]:
    if replicas.min_replicas == replicas.max_replicas:
        return {"num_replicas": replicas.min_replicas}
    scaling: dict[str, Any] = {
        "min_replicas": replicas.min_replicas,
        "max_replicas": replicas.max_replicas,
        "target_ongoing_requests": replicas.target_ongoing,
        "upscale_delay_s": _UPSCALE_DELAY_S,
        "downscale_delay_s": _DOWNSCALE_DELAY_S,
    }
    if policy is not None:
        scaling["policy"] = {"policy_function": policy}
    return {"autoscaling_config": scaling}


def _parse_args(args: Mapping[str, Any]) -> ServiceConfig:
    fields = dict(args)
    path = fields.pop("config", None)
    # Overrides are parsed as YAML, of which JSON is a subset.
    texts = {key: v if isinstance(v, str) else json.dumps(v) for key, v in fields.items()}
    return configuration.load(ServiceConfig, path, [f"{key}={v}" for key, v in texts.items()])


def _with_absolute_uris(config: ServiceConfig) -> ServiceConfig:
    """Return a config without relative paths, since workers have other working directories."""
    return replace(
        config,
        libraries={name: absolute_uri(uri) for name, uri in config.libraries.items()},
        base=absolute_spec(config.base),
        encoder=absolute_spec(config.encoder),
        tokens=None if config.tokens is None else absolute_uri(config.tokens),
    )
