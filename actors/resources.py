"""The connection to Ray, what a unit of work takes from the cluster, and credentials."""

import logging
import os
import secrets
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from loraseg.errors import ConfigError

__all__ = [
    "ResourceConfig",
    "StorageCredentials",
    "alive_nodes",
    "check_capacity",
    "check_total_capacity",
    "connect",
    "connect_with_capacity",
    "start_on_driver_node",
]

logger = logging.getLogger(__name__)

_LOCAL_OBJECT_STORE_BYTES = 200 * 1024**2

_STORE_VARIABLES = (
    "AWS_ACCESS_KEY_ID",
    "AWS_SECRET_ACCESS_KEY",
    "AWS_SESSION_TOKEN",
    "AWS_REGION",
    "AWS_DEFAULT_REGION",
    "AWS_ENDPOINT_URL",
    "AWS_ENDPOINT_URL_S3",
    "AWS_REQUEST_CHECKSUM_CALCULATION",
    "AWS_RESPONSE_CHECKSUM_VALIDATION",
    "AWS_CA_BUNDLE",
    "LORASEG_CACHE",
)


@dataclass(frozen=True, kw_only=True, slots=True)
class ResourceConfig:
    """What a unit of work takes and how many run at once.

    Attributes:
        cpus: CPUs reserved for each unit. The number of threads of a training is part of its
            recipe, because the last bits depend on it; ``threads`` is for all other work.
        gpus: GPUs reserved for each unit; with 0.5 two share one.
        node: A custom resource that the node must have, such as ``trainer`` in cluster.yaml; None
            for any node.
        max_parallel: Limit of simultaneous units; None for what the cluster has room for.
        retries: How often a unit may lose its worker or node before it fails.
    """

    cpus: float = 1.0
    gpus: float = 0.0
    node: str | None = None
    max_parallel: int | None = None
    retries: int = 3

    def __post_init__(self) -> None:
        """Check the ranges.

        Raises:
            ConfigError: A number is out of range.
        """
        if self.cpus <= 0 or self.gpus < 0:
            raise ConfigError(
                f"resources: expected cpus > 0 and gpus >= 0, got {self.cpus} and {self.gpus}"
            )
        if self.max_parallel is not None and self.max_parallel < 1:
            raise ConfigError(f"resources: max_parallel must be >= 1, got {self.max_parallel}")
        if self.retries < 0:
            raise ConfigError(f"resources: retries must be >= 0, got {self.retries}")

    @property
    def threads(self) -> int:
        """Torch threads of one unit."""
        return max(1, int(self.cpus))

    @property
    def custom_resources(self) -> dict[str, float]:
        """The custom resource by name, in an amount too small to limit how many units share it."""
        return {} if self.node is None else {self.node: 0.001}

    @property
    def ray_resources(self) -> dict[str, float]:
        """All resources by Ray's names."""
        return {"CPU": self.cpus, "GPU": self.gpus, **self.custom_resources}

    def __str__(self) -> str:
        """Return a short description such as ``1 CPU, 0.5 GPU on trainer``."""
        gpus = f", {self.gpus:g} GPU" if self.gpus else ""
        return f"{self.cpus:g} CPU{gpus}{f' on {self.node}' if self.node else ''}"


@dataclass(frozen=True, slots=True)
class StorageCredentials:
    """The driver's S3 settings, for use in a worker.

    They are passed as an argument of the task: Ray writes the variables of a ``runtime_env`` to its
    log files, and with them the secret key.
    """

    variables: Mapping[str, str] = field(repr=False)

    @classmethod
    def from_environment(cls) -> "StorageCredentials":
        """Read the settings from this process's environment."""
        return cls({name: os.environ[name] for name in _STORE_VARIABLES if name in os.environ})

    def export(self) -> None:
        """Set them in this process; variables that the driver lacks keep the node's value."""
        os.environ.update(self.variables)


def connect(*, cpus: int | None = None) -> bool:
    """Join the cluster that ``RAY_ADDRESS`` names, else start one on this machine.

    Args:
        cpus: CPUs of a cluster that is started here; None for those of the machine.

    Returns:
        True if a cluster was started, which stops with this process. False if one was joined or
        the process was connected already.

    Raises:
        ConfigError: The cluster that ``RAY_ADDRESS`` names cannot be joined.
    """
    if ray.is_initialized():
        return False
    options: dict[str, Any] = {"log_to_driver": False}
    if os.environ.get("RAY_ADDRESS"):
        try:
            ray.init(**options)
        except (ConnectionError, ValueError) as error:
            raise ConfigError(
                f"RAY_ADDRESS={os.environ['RAY_ADDRESS']}: cannot join that cluster: {error}"
            ) from error
        return False
    # Ray listens on all interfaces and requires a token by default. A token in memory prevents Ray
    # from writing one to the home folder, which would change how later clusters start.
    # RAY_AUTH_MODE is read when ray is imported: setting it here would have no effect.
    if "RAY_AUTH_TOKEN_PATH" not in os.environ:
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
    ray.init(
        address="local",
        num_cpus=cpus,
        include_dashboard=False,
        object_store_memory=_LOCAL_OBJECT_STORE_BYTES,
        **options,
    )
    return True


def connect_with_capacity(*resources: ResourceConfig) -> bool:
    """Connect to Ray and check that one unit of each kind fits on a node.

    Returns:
        Whether the cluster may grow: it was joined, so it may have an autoscaler.

    Raises:
        ConfigError: The cluster cannot be joined, or is too small and cannot grow.
    """
    may_grow = not connect()
    for kind in resources:
        check_capacity(kind, may_grow=may_grow)
    return may_grow


def check_capacity(resources: ResourceConfig, *, may_grow: bool) -> None:
    """Compare what one unit takes with the nodes that are alive.

    Args:
        resources: What one unit takes.
        may_grow: Whether an autoscaler may start a larger node.

    Raises:
        ConfigError: No node is large enough, and the cluster cannot grow.
    """
    needs, nodes = resources.ray_resources, [node["Resources"] for node in alive_nodes()]
    if any(all(node.get(kind, 0) >= need for kind, need in needs.items()) for node in nodes):
        return
    here = "; ".join(f"{n.get('CPU', 0):g} CPU, {n.get('GPU', 0):g} GPU" for n in nodes)
    message = f"no node has {resources} for one unit of work (nodes now: {here})"
    if not may_grow:
        raise ConfigError(f"resources: {message}")
    logger.warning("%s; waiting for the autoscaler to start one", message)


def check_total_capacity(demands: Sequence[tuple[ResourceConfig, int]], *, may_grow: bool) -> None:
    """Compare what must run at the same time with the whole cluster.

    A stage that cannot start while another one holds the cluster would deadlock both.

    Args:
        demands: What one unit of each stage takes, and the number of units.
        may_grow: Whether an autoscaler may start nodes.

    Raises:
        ConfigError: The cluster is too small and cannot grow.
    """
    needs: dict[str, float] = defaultdict(float)
    for resources, count in demands:
        for kind, need in resources.ray_resources.items():
            needs[kind] += count * need
    nodes = [node["Resources"] for node in alive_nodes()]
    has = {kind: sum(node.get(kind, 0) for node in nodes) for kind in needs}
    if all(has[kind] >= need for kind, need in needs.items()):
        return
    stages = " and ".join(f"{count} x ({resources})" for resources, count in demands)
    message = (
        f"{stages} must run at the same time, which takes {needs['CPU']:g} CPU and "
        f"{needs['GPU']:g} GPU; the cluster has {has['CPU']:g} and {has['GPU']:g}"
    )
    if not may_grow:
        raise ConfigError(f"resources: {message}; set smaller cpus or gpus")
    logger.warning("%s; waiting for the autoscaler to start more", message)


def alive_nodes() -> list[dict[str, Any]]:
    """Return Ray's description of each node that is alive."""
    return [node for node in ray.nodes() if node["Alive"]]


def start_on_driver_node(actor_class: type, **options: Any) -> Any:
    """Start an actor that takes no CPU on the driver's node, so that it lives as long as that.

    Args:
        actor_class: Built without arguments.
        options: Other options of the actor.
    """
    node_id = ray.get_runtime_context().get_node_id()
    strategy = NodeAffinitySchedulingStrategy(node_id, soft=False)
    actor: Any = ray.remote(actor_class)
    return actor.options(num_cpus=0, scheduling_strategy=strategy, **options).remote()
