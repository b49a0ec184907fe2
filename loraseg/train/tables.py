"""The two tables of a training job, as text: what is planned, and what came of it."""

from collections.abc import Sequence

from loraseg.train.tasks import TaskResult, TrainingPlan

__all__ = ["format_skipped_files", "format_table", "plan_table", "result_table"]


def format_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Align the columns with two spaces between them; every line ends in a newline."""
    lines = [list(header), *map(list, rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(header))]
    return "".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        + "\n"
        for line in lines
    )


def plan_table(plans: Sequence[TrainingPlan | tuple[str, str]], resources: str) -> str:
    """Show one row for each adapter.

    Args:
        plans: What each would do, or (name, reason) where it cannot be planned.
        resources: What each takes, such as ``"1 CPU"``.
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


def result_table(results: Sequence[TaskResult | tuple[str, str]]) -> str:
    """Show one row for each adapter: its result, or (name, reason) where it failed."""
    header = ("adapter", "state", "digest", "resumed at", "seconds", "metrics or reason")
    return format_table(header, [_result_row(result) for result in results])


def format_skipped_files(results: Sequence[TaskResult | tuple[str, str]]) -> str:
    """List every file that was left out as unusable, one a line; empty if none was."""
    return "".join(
        f"left out of {result.name}: {reason}\n"
        for result in results
        if isinstance(result, TaskResult)
        for reason in result.skipped_files
    )


def _result_row(result: TaskResult | tuple[str, str]) -> tuple[str, ...]:
    if isinstance(result, tuple):
        name, reason = result
        return (name, "failed", "-", "-", "-", reason)
    return (
        result.name,
        ("skipped" if result.skipped else "published")
        + ("" if result.current else ", not current"),
        result.digest[:12],
        str(result.resumed_from_step) if result.resumed_from_step else "-",
        f"{result.seconds:.1f}",
        "  ".join(f"{name} {value:.3f}" for name, value in sorted(result.metrics.items())),
    )
