#!/usr/bin/env bash
# The wheel must carry the miniature weights and the report templates, and work outside the checkout.
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
from loraseg.backbones.diffusion import load_diffusion
from loraseg.segment.closed_set.checkpoint import load_closed_set_segmenter
from loraseg.segment.open_vocabulary.base import load_base

assert "site" in pathlib.Path(loraseg.__file__).parts, loraseg.__file__
load_base("miniature")
load_clip("miniature")
generator = load_diffusion("miniature")
assert generator.encode_text(["a car in the rain"]).hidden.shape == (1, 32, 96)
weights = importlib.resources.files("loraseg.miniature") / "weights"
for name in ("merges.txt", "vocab.json", "tokenizer.json"):
    assert (weights / "generator" / "tokenizer" / name).is_file(), name
load_closed_set_segmenter(str(weights / "judge.safetensors"))
for name in ("page.html.j2", "blocks.html.j2", "style.css.j2"):
    assert (importlib.resources.files("loraseg.reports") / "templates" / name).is_file(), name
assert not (importlib.resources.files("loraseg.miniature") / "studies").is_dir()
assert (importlib.resources.files("loraseg.serving") / "static" / "index.html").is_file()
assert (importlib.resources.files("jobs") / "grafana_dashboard.json").is_file()
print("wheel: weights and templates found, base, encoder, generator and judge load")
PY
