#!/usr/bin/env bash
# The wheel must carry the miniature weights and the report template, and work outside the checkout.
set -euo pipefail
cd "$(dirname "$0")/.."
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
.venv/bin/python -m pip wheel --quiet --no-deps --wheel-dir "$work" .
.venv/bin/python -m pip install --quiet --no-deps --target "$work/site" "$work"/loraseg-*.whl
python="$PWD/.venv/bin/python"
cd "$work"
PYTHONPATH="$work/site" "$python" - <<'PY'
import importlib.resources
import pathlib

import loraseg
from loraseg.backbones.clip import load_clip
from loraseg.segment.base import load_base

assert "site" in pathlib.Path(loraseg.__file__).parts, loraseg.__file__
load_base("miniature")
load_clip("miniature")
template = importlib.resources.files("loraseg.evaluate") / "templates" / "report.html.j2"
assert template.is_file()
assert (importlib.resources.files("loraseg.serving") / "static" / "index.html").is_file()
assert (importlib.resources.files("jobs") / "grafana_dashboard.json").is_file()
print("wheel: weights and template found, base and encoder load")
PY
