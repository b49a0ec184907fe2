"""Fail when a file named on the command line is too large for the repository."""

import sys
from pathlib import Path

LIMIT_BYTES = 12_000_000


def main(paths: list[str]) -> int:
    large = [path for path in paths if Path(path).stat().st_size > LIMIT_BYTES]
    for path in large:
        sys.stderr.write(f"{path}: {Path(path).stat().st_size} bytes, limit {LIMIT_BYTES}\n")
    return int(bool(large))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
