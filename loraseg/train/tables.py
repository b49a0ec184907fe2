"""The tables that a training job prints: plans and results."""

from collections.abc import Sequence

from loraseg.reports.text_table import format_table
from loraseg.train.tasks import TaskResult, TrainingPlan

__all__ = ["format_skipped_files", "plan_table", "result_table"]


def plan_table(plans: Sequence[TrainingPlan | tuple[str, str]], resources: str) -> str:
    """Return a table with one row per adapter.

    Args:
        plans: The plan of each adapter, or (name, reason) if planning failed.
        resources: Resources of each, such as ``"1 CPU"``.
    """
    header = ("adapter", "images", "parameters", "steps", "resources", "state")
    rows = [
        (plan[0], "-", "-", "-", "-", f"broken: {plan[1]}")
        if isinstance(plan, tuple)
        else (
            plan.name,
            str(plan.images),
            f"{plan.parameters:,}",
            str(plan.steps),
            resources,
            "published, to be skipped" if plan.published else "to be trained",
        )
        for plan in plans
    ]
    return format_table(header, rows)


def result_table(
    results: Sequence[TaskResult | tuple[str, str]], metrics: Sequence[str] = ()
) -> str:
    """Return a table with one row per adapter.

    Args:
        results: The result of each adapter, or (name, reason) if it failed.
        metrics: Metrics to show first, in this order; the others follow by name.
    """
    header = ("adapter", "state", "digest", "resumed at", "seconds", "metrics or reason")
    return format_table(header, [_result_row(result, metrics) for result in results])


def format_skipped_files(results: Sequence[TaskResult | tuple[str, str]]) -> str:
    """Return one line per unusable file that was left out; empty if there is none."""
    return "".join(
        f"left out of {result.name}: {reason}\n"
        for result in results
        if isinstance(result, TaskResult)
        for reason in result.skipped_files
    )


def _result_row(result: TaskResult | tuple[str, str], metrics: Sequence[str]) -> tuple[str, ...]:
    if isinstance(result, tuple):
        name, reason = result
        return (name, "failed", "-", "-", "-", reason)
    order = [name for name in metrics if name in result.metrics]
    order += sorted(set(result.metrics) - set(order))
    return (
        result.name,
        ("skipped" if result.skipped else "published")
        + ("" if result.current else ", not current"),
        result.digest[:12],
        str(result.resumed_from_step) if result.resumed_from_step else "-",
        f"{result.seconds:.1f}",
        "  ".join(f"{name} {result.metrics[name]:.3f}" for name in order),
    )
