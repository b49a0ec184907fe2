"""Settings of an endpoint: models and libraries, limits of requests, replicas."""

from dataclasses import dataclass, field

from loraseg.errors import ConfigError
from loraseg.inference.config import SegmenterConfig

__all__ = ["Limits", "ReplicaConfig", "ServiceConfig"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Limits:
    """Limits of requests; a request beyond them gets an error response.

    Attributes:
        body_bytes: Size of a request's body.
        body_timeout_s: Time to receive the body.
        pixels: Size of an image, checked in its header before decoding.
        classes: Number of classes of a request, at most 255 since label maps have 8 bits.
        class_name_chars: Length of a class name.
        images: Number of images in a batch request.
        request_timeout_s: Time from arrival to response; clients may set a shorter one.
        concurrent: Concurrent requests of a token, in each gateway replica.
        queued: Images that wait for a segmenter replica, besides those in a batch, before 503.
    """

    body_bytes: int = 32 * 2**20
    body_timeout_s: float = 20.0
    pixels: int = 36_000_000
    classes: int = 255
    class_name_chars: int = 100
    images: int = 64
    request_timeout_s: float = 60.0
    concurrent: int = 64
    queued: int = 64

    def __post_init__(self) -> None:
        """Check the ranges."""
        for name in self.__dataclass_fields__:
            if getattr(self, name) <= 0:
                raise ConfigError(f"limits: {name}: got {getattr(self, name)}, expected above 0")
        if self.classes > 255:
            raise ConfigError(f"limits: classes: got {self.classes}, expected at most 255")


@dataclass(frozen=True, kw_only=True, slots=True)
class ReplicaConfig:
    """Resources and scaling of a deployment.

    Attributes:
        min_replicas: Number of replicas without load.
        max_replicas: Maximum number of replicas; autoscaling follows the ongoing requests.
        cpus: Per replica; also its number of torch threads (rounded down, at least one).
        gpus: Per replica; with 0.5 two replicas share a GPU.
        node: Custom resource of suitable nodes, such as ``server`` in cluster.yaml; None for any.
        target_ongoing: Ongoing requests per replica that autoscaling aims for.
    """

    min_replicas: int = 1
    max_replicas: int = 1
    cpus: float = 1.0
    gpus: float = 0.0
    node: str | None = None
    target_ongoing: float = 4.0

    def __post_init__(self) -> None:
        """Check the ranges."""
        if not 1 <= self.min_replicas <= self.max_replicas:
            raise ConfigError(
                f"replicas: got min_replicas {self.min_replicas}, max_replicas "
                f"{self.max_replicas}; expected 1 <= min_replicas <= max_replicas"
            )
        if self.cpus < 0 or self.gpus < 0 or self.target_ongoing <= 0:
            raise ConfigError(
                f"replicas: got cpus {self.cpus}, gpus {self.gpus}, target_ongoing "
                f"{self.target_ongoing}; expected 0 or more, and a target above 0"
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class ServiceConfig(SegmenterConfig):
    """Settings of an endpoint.

    Attributes:
        libraries: Store URI of each library by its name in the API; the first is the default.
        sliding: Segment overlapping windows of every image, as in SemLA's evaluation.
        k: Default number of fused adapters; None for the encoder's preset.
        temperature: Default temperature of the weights; None for the encoder's preset.
        batch: Maximum number of images in a batch of the model.
        batch_wait_s: Time that the first image of a batch waits for others.
        poll_s: Interval between checks for a newer catalog generation.
        cache_bytes: Memory for adapters in each segmenter replica.
        tokens: URI or path of the token file; None accepts all clients and closes the admin
            routes.
        limits: Limits of requests.
        gateway: Replicas for HTTP, decoding and encoding.
        retrieval: Replicas for embedding and search.
        segmenter: Replicas of the model.
    """

    libraries: dict[str, str]
    sliding: bool = False
    batch: int = 8
    batch_wait_s: float = 0.005
    poll_s: float = 2.0
    cache_bytes: int = 512 * 2**20
    tokens: str | None = None
    limits: Limits = field(default_factory=Limits)
    gateway: ReplicaConfig = field(default_factory=ReplicaConfig)
    retrieval: ReplicaConfig = field(default_factory=ReplicaConfig)
    segmenter: ReplicaConfig = field(default_factory=ReplicaConfig)

    def __post_init__(self) -> None:
        """Check libraries and ranges."""
        if not self.libraries:
            raise ConfigError(
                "libraries: expected at least one, such as {main: s3://bucket/adapters}"
            )
        if self.batch < 1 or self.batch_wait_s < 0 or self.poll_s <= 0:
            raise ConfigError(
                f"batch {self.batch}, batch_wait_s {self.batch_wait_s}, poll_s {self.poll_s}: "
                "expected at least 1, 0 or more, and above 0"
            )
