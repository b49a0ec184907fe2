"""Where work runs: the connection to Ray, what one unit of work takes, what workers must know."""

import logging
import os
import secrets
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import ray

from loraseg.errors import ConfigError

__all__ = [
    "ResourceConfig",
    "StorageCredentials",
    "check_capacity",
    "check_total_capacity",
    "connect",
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
    """What one adapter takes and how many run at once.

    Attributes:
        cpus: CPUs set aside for each adapter. A recipe says itself how many threads it trains
            with, because the last bits depend on that; ``threads`` is for all other work.
        gpus: GPUs of each adapter; 0.5 lets two share one.
        node: A custom resource that the node must offer, such as ``trainer`` in cluster.yaml; None
            for any node.
        max_parallel: Most adapters at once; None for as many as the cluster holds.
        retries: How often one adapter may lose its worker or node before it counts as failed.
    """

    cpus: float = 1.0
    gpus: float = 0.0
    node: str | None = None
    max_parallel: int | None = None
    retries: int = 3

    def __post_init__(self) -> None:
        """Check the ranges."""
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
        """Torch threads of one adapter."""
        return max(1, int(self.cpus))

    @property
    def custom_resources(self) -> dict[str, float]:
        """The custom resource as Ray wants it: so little that it never limits how many share."""
        return {} if self.node is None else {self.node: 0.001}

    @property
    def ray_resources(self) -> dict[str, float]:
        """All of it by Ray's names."""
        return {"CPU": self.cpus, "GPU": self.gpus, **self.custom_resources}

    def __str__(self) -> str:
        """Say it in a few words, such as ``1 CPU, 0.5 GPU on trainer``."""
        gpus = f", {self.gpus:g} GPU" if self.gpus else ""
        return f"{self.cpus:g} CPU{gpus}{f' on {self.node}' if self.node else ''}"


@dataclass(frozen=True, slots=True)
class StorageCredentials:
    """The driver's S3 settings, to be set in a worker.

    They travel as an argument of the task: Ray writes a ``runtime_env`` with all its variables into
    its log files, and so would tell the secret key to whoever can read them.
    """

    variables: Mapping[str, str] = field(repr=False)

    @classmethod
    def from_environment(cls) -> "StorageCredentials":
        """Take the settings from this process's environment."""
        return cls({name: os.environ[name] for name in _STORE_VARIABLES if name in os.environ})

    def export(self) -> None:
        """Set them in this process; what the driver does not set keeps the node's own value."""
        os.environ.update(self.variables)


def connect(*, cpus: int | None = None) -> bool:
    """Join the cluster that ``RAY_ADDRESS`` names, else start one on this machine.

    Args:
        cpus: What a cluster that is started here offers; None for what the machine has.

    Returns:
        True if the cluster was started here, and so ends with this process. A process that is
        connected already stays as it is (False).
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
    # Ray listens on all interfaces and asks for a token by default. One of our own, in memory,
    # keeps it from leaving one in the home folder, where it would change how later clusters start.
    # RAY_AUTH_MODE itself is read when ray is imported: setting it here would come too late.
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


def check_capacity(resources: ResourceConfig, *, may_grow: bool) -> None:
    """Compare what one adapter takes with the nodes that are up.

    Args:
        resources: What one adapter takes.
        may_grow: Whether an autoscaler might still bring a larger node.

    Raises:
        ConfigError: No node is large enough and none will come.
    """
    needs, nodes = resources.ray_resources, _alive_nodes()
    if any(all(node.get(kind, 0) >= need for kind, need in needs.items()) for node in nodes):
        return
    here = "; ".join(f"{n.get('CPU', 0):g} CPU, {n.get('GPU', 0):g} GPU" for n in nodes)
    message = f"no node has {resources} for one adapter (nodes now: {here})"
    if not may_grow:
        raise ConfigError(f"resources: {message}")
    logger.warning("%s; waiting for the autoscaler to bring one", message)


def check_total_capacity(demands: Sequence[tuple[ResourceConfig, int]], *, may_grow: bool) -> None:
    """Compare what must run at the same time with the whole cluster.

    A stage that cannot start while another holds the cluster would make both wait for ever.

    Args:
        demands: What one unit of each stage takes, and how many of it.
        may_grow: Whether an autoscaler might still bring nodes.

    Raises:
        ConfigError: The cluster is too small and will not grow.
    """
    needs: dict[str, float] = defaultdict(float)
    for placement, count in demands:
        for kind, need in placement.ray_resources.items():
            needs[kind] += count * need
    nodes = _alive_nodes()
    has = {kind: sum(node.get(kind, 0) for node in nodes) for kind in needs}
    if all(has[kind] >= need for kind, need in needs.items()):
        return
    stages = " and ".join(f"{count} x ({placement})" for placement, count in demands)
    message = (
        f"{stages} must run at the same time, which takes {needs['CPU']:g} CPU and "
        f"{needs['GPU']:g} GPU; the cluster has {has['CPU']:g} and {has['GPU']:g}"
    )
    if not may_grow:
        raise ConfigError(f"resources: {message}; set smaller cpus or gpus")
    logger.warning("%s; waiting for the autoscaler to bring more", message)


def _alive_nodes() -> list[dict[str, float]]:
    return [node["Resources"] for node in ray.nodes() if node["Alive"]]
