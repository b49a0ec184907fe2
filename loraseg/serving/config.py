"""What is served, how it is placed, and what a client may ask for."""

from dataclasses import dataclass, field

from loraseg.errors import ConfigError
from loraseg.inference.config import SegmenterConfig

__all__ = ["Limits", "ReplicaConfig", "ServiceConfig"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Limits:
    """What a client may ask for; beyond it, a request is refused with a reason.

    Attributes:
        body_bytes: Of a whole request.
        body_timeout_s: For a request's body to arrive.
        pixels: Of one image, told from its header before it is decoded.
        classes: In one request; label maps are 8-bit, so at most 255.
        class_name_chars: Of one class name.
        images: In one batch request.
        request_timeout_s: From a request's arrival to its answer; clients may ask for less.
        concurrent: Requests in work for one token, in each gateway replica.
        queued: Images waiting for a segmenter replica, beyond those it works on, before 503.
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
    """How one kind of deployment is placed and scaled.

    Attributes:
        min_replicas: Kept even when idle.
        max_replicas: Most under load; between the two, the number follows ongoing requests.
        cpus: Set aside for each; also its torch threads (rounded down, at least one).
        gpus: Of each; 0.5 lets two share one.
        node: A custom resource that the node must offer, such as ``server`` in cluster.yaml.
        target_ongoing: Requests in work for each replica that autoscaling aims at.
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
                f"replicas: got {self.min_replicas} to {self.max_replicas}, expected 1 or more, "
                "and no fewer at most than at least"
            )
        if self.cpus < 0 or self.gpus < 0 or self.target_ongoing <= 0:
            raise ConfigError(
                f"replicas: got cpus {self.cpus}, gpus {self.gpus}, target_ongoing "
                f"{self.target_ongoing}; expected 0 or more, and a target above 0"
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class ServiceConfig(SegmenterConfig):
    """One endpoint: a frozen base, the libraries it serves, limits and placement.

    Attributes:
        libraries: Store URI of each library by the name that clients use; the first is the default.
        sliding: Overlapping windows over every image, as published numbers were made.
        k: Default number of fused adapters; None for the encoder's preset.
        temperature: Default temperature of the weights; None for the encoder's preset.
        batch: Most images that go through the model together.
        batch_wait_s: How long the first image of a batch waits for company.
        poll_s: How often the catalogs are asked for a newer generation.
        cache_bytes: Memory for adapters in each segmenter replica.
        tokens: URI or path of the token file; None leaves the endpoint open to everybody who can
            reach it, and the admin routes closed.
        limits: What a client may ask for.
        gateway: HTTP, checks, decoding and encoding of images.
        retrieval: Embedding and search.
        segmenter: The model.
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
        """Check what the types cannot say."""
        if not self.libraries:
            raise ConfigError(
                "libraries: expected at least one, such as {main: s3://bucket/adapters}"
            )
        if self.batch < 1 or self.batch_wait_s < 0 or self.poll_s <= 0:
            raise ConfigError(
                f"batch {self.batch}, batch_wait_s {self.batch_wait_s}, poll_s {self.poll_s}: "
                "expected at least 1, 0 or more, and above 0"
            )
