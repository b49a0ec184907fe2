"""Generate the Grafana dashboard of the endpoint.

``python -m jobs.grafana > jobs/grafana_dashboard.json``
"""

import json
import sys
from dataclasses import dataclass
from typing import Any

__all__ = ["dashboard"]

_DATASOURCE = {"type": "prometheus", "uid": "${datasource}"}
_WIDTH, _HEIGHT, _COLUMNS = 8, 7, 3


@dataclass(frozen=True, slots=True)
class _Panel:
    """Title, Grafana unit, and pairs of legend and expression."""

    title: str
    unit: str
    lines: tuple[tuple[str, str], ...]


def _rate(metric: str, by: str = "") -> str:
    grouped = f" by ({by})" if by else ""
    return f"sum{grouped} (rate(ray_loraseg_{metric}[$__rate_interval]))"


def _quantile(share: float, metric: str, by: str = "") -> str:
    labels = f"le, {by}" if by else "le"
    return f"histogram_quantile({share}, {_rate(f'{metric}_bucket', labels)})"


_PANELS = (
    _Panel(
        "Requests", "reqps", (("{{path}} {{status}}", _rate("requests_total", "path, status")),)
    ),
    _Panel(
        "Errors by code",
        "reqps",
        (
            (
                "{{status}} {{code}}",
                'sum by (status, code) (rate(ray_loraseg_requests_total{code!=""}'
                "[$__rate_interval]))",
            ),
        ),
    ),
    _Panel(
        "Latency of /v1/segment",
        "s",
        tuple(
            (
                f"p{100 * share:g}",
                f"histogram_quantile({share}, sum by (le) (rate("
                'ray_loraseg_request_seconds_bucket{path="/v1/segment"}[$__rate_interval])))',
            )
            for share in (0.5, 0.95, 0.99)
        ),
    ),
    _Panel("Time by stage, p95", "s", (("{{stage}}", _quantile(0.95, "stage_seconds", "stage")),)),
    _Panel(
        "Images waiting for or in the models",
        "short",
        (("{{replica}}", "sum by (replica) (ray_loraseg_segmenter_images)"),),
    ),
    _Panel(
        "Batch size",
        "short",
        (
            ("mean", f"{_rate('batch_images_sum')} / {_rate('batch_images_count')}"),
            ("p95", _quantile(0.95, "batch_images")),
        ),
    ),
    _Panel(
        "Images by mode",
        "short",
        (
            ("{{library}} {{mode}}", _rate("images_total", "library, mode")),
            ("tiles", _rate("tiles_total")),
        ),
    ),
    _Panel(
        "Share of images with fallback to the base",
        "percentunit",
        (
            (
                "fallback",
                'sum (rate(ray_loraseg_images_total{fallback="yes"}[$__rate_interval])) / '
                f"{_rate('images_total')}",
            ),
        ),
    ),
    _Panel(
        "Adapters in memory",
        "short",
        (("{{replica}}", "sum by (replica) (ray_loraseg_adapters_resident)"),),
    ),
    _Panel(
        "Memory of the adapters",
        "bytes",
        (("{{replica}}", "sum by (replica) (ray_loraseg_adapter_bytes)"),),
    ),
    _Panel(
        "Adapter cache",
        "ops",
        tuple(
            (name, _rate(f"adapter_{name}_total"))
            for name in ("hits", "misses", "evictions", "failures")
        ),
    ),
    _Panel(
        "Load time of an adapter",
        "s",
        (("mean", f"{_rate('adapter_load_seconds_total')} / {_rate('adapter_misses_total')}"),),
    ),
    _Panel(
        "Catalog generation",
        "short",
        (("{{library}} {{replica}}", "ray_loraseg_catalog_generation"),),
    ),
    _Panel(
        "Time since the last catalog check",
        "s",
        (("{{library}}", "max by (library) (ray_loraseg_catalog_age_seconds)"),),
    ),
    _Panel(
        "Adapters, and adapters out of service",
        "short",
        (
            ("{{library}}", "max by (library) (ray_loraseg_catalog_adapters)"),
            (
                "{{library}} out of service",
                "max by (library) (ray_loraseg_adapters_out_of_service)",
            ),
        ),
    ),
)


def dashboard() -> dict[str, Any]:
    """Return the dashboard as Grafana's JSON model."""
    return {
        "title": "loraseg endpoint",
        "uid": "loraseg-endpoint",
        "schemaVersion": 39,
        "refresh": "10s",
        "time": {"from": "now-1h", "to": "now"},
        "templating": {
            "list": [{"name": "datasource", "type": "datasource", "query": "prometheus"}]
        },
        "panels": [_render_panel(number, panel) for number, panel in enumerate(_PANELS)],
    }


def _render_panel(number: int, panel: _Panel) -> dict[str, Any]:
    row, column = divmod(number, _COLUMNS)
    return {
        "id": number + 1,
        "type": "timeseries",
        "title": panel.title,
        "datasource": _DATASOURCE,
        "gridPos": {"x": column * _WIDTH, "y": row * _HEIGHT, "w": _WIDTH, "h": _HEIGHT},
        "fieldConfig": {"defaults": {"unit": panel.unit, "min": 0}, "overrides": []},
        "targets": [
            {"refId": chr(ord("A") + index), "expr": expression, "legendFormat": legend}
            for index, (legend, expression) in enumerate(panel.lines)
        ],
    }


if __name__ == "__main__":
    sys.stdout.write(json.dumps(dashboard(), indent=1) + "\n")
