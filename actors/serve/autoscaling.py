"""How many segmenters: as many as the images in work ask for."""

from typing import Any

from ray.serve.config import AutoscalingContext

__all__ = ["images_in_flight_policy"]


def images_in_flight_policy(context: AutoscalingContext) -> tuple[float, dict[str, Any]]:
    """Return the number of replicas that the images now in work need.

    Serve's own policy counts calls, and one call may bring a whole batch. Bounds, factors and
    delays of the autoscaling config are applied by Serve to what this returns.
    """
    counts = (context.aggregated_metrics or {}).get("images", {})
    # Calls that no replica has taken yet are at least an image each.
    images = sum(counts.values()) + (context.total_queued_requests or 0)
    config: Any = context.config
    return images / config.get_target_ongoing_requests(), {}
