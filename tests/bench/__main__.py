"""python -m tests.bench NAME|all: print one JSON object a benchmark, the last line the last one."""

import json
import sys

from tests.bench import retrieval

BENCHES = {"retrieval": retrieval.run}


def main(arguments: list[str]) -> int:
    names = list(BENCHES) if arguments in ([], ["all"]) else arguments
    if unknown := [name for name in names if name not in BENCHES]:
        sys.stderr.write(f"unknown: {', '.join(unknown)} (known: {', '.join(BENCHES)})\n")
        return 2
    for name in names:
        sys.stdout.write(json.dumps(BENCHES[name]()) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
