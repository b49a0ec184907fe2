"""Measure: ``python -m tests.bench NAME`` prints one JSON object as its last line.

``python -m tests.bench all`` runs every benchmark in a process of its own and writes
bench-results/results.json and bench-results/results.md.
"""

import importlib
import json
import subprocess
import sys
from pathlib import Path

from tests.bench.goals import table

BENCHES = (
    *("retrieval", "catseg_decoder", "text_bank", "library_scale"),
    *("training", "fused_forward", "sampler", "vote", "endpoint"),
    "synth_overhead",
)
FOLDER = Path("bench-results")


def main(arguments: list[str]) -> int:
    if arguments in ([], ["all"]):
        return run_all()
    if unknown := [name for name in arguments if name not in BENCHES]:
        sys.stderr.write(f"unknown: {', '.join(unknown)} (known: all, {', '.join(BENCHES)})\n")
        return 2
    for name in arguments:
        result = importlib.import_module(f"tests.bench.{name}").run()
        sys.stdout.write(json.dumps(result) + "\n")
    return 0


def run_all() -> int:
    FOLDER.mkdir(exist_ok=True)
    results: list[dict[str, object]] = []
    failed: list[str] = []
    for number, name in enumerate(BENCHES, 1):
        sys.stderr.write(f"[{number}/{len(BENCHES)}] {name}\n")
        command = [sys.executable, "-m", "tests.bench", name]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
        if done.returncode:
            failed.append(name)
            continue
        results.append(json.loads(done.stdout.strip().splitlines()[-1]))
        sys.stdout.write(json.dumps(results[-1]) + "\n")
        (FOLDER / "results.json").write_text(json.dumps(results, indent=1) + "\n")
        (FOLDER / "results.md").write_text(table(results))
    sys.stderr.write(f"{table(results)}\n{FOLDER}/results.md, {FOLDER}/results.json\n")
    if failed:
        sys.stderr.write(f"failed: {', '.join(failed)}\n")
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
