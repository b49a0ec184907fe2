"""Autoscaling of the segmenter by images."""

from typing import Any

from ray.serve.config import AutoscalingContext

__all__ = ["images_in_flight_policy"]


def images_in_flight_policy(context: AutoscalingContext) -> tuple[float, dict[str, Any]]:
    """Return the number of replicas for the images in flight.

    Serve's own policy counts calls, and one call may have a whole batch. Serve applies the limits,
    factors and delays of the autoscaling config to the returned number.
    """
    counts = (context.aggregated_metrics or {}).get("images", {})
    # Queued calls have at least one image each.
    images = sum(counts.values()) + (context.total_queued_requests or 0)
    config: Any = context.config
    return images / config.get_target_ongoing_requests(), {}
