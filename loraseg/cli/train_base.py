"""``loraseg train-base``: continue the training of a segmenter on a dataset folder."""

import argparse
import json
import sys
import time
from typing import TYPE_CHECKING, Any

from loraseg.cli.console import print_line

if TYPE_CHECKING:
    from loraseg.train.core.progress import Progress

__all__ = ["add"]

_PRINT_INTERVAL_S = 10.0


def add(commands: Any) -> None:
    """Add the command to the parser."""
    parser = commands.add_parser(
        "train-base",
        help="continue training a segmenter, to use it as the base of a library",
        description="key=value sets any other field of the task, for example "
        "recipe.loop.steps=400 recipe.augment.crop=64 seed=1 images=50.",
    )
    parser.add_argument("--data", metavar="FOLDER", help="path or URI of a dataset")
    parser.add_argument(
        "--out", metavar="FILE", help="path or URI of the .safetensors file to write"
    )
    parser.add_argument("--base", metavar="BASE", help="initial segmenter; default: miniature")
    parser.add_argument("--config", metavar="FILE", help="YAML file with fields of the task")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="set single fields")
    parser.set_defaults(command=_train_base)


def _train_base(arguments: argparse.Namespace) -> int:
    from loraseg import config as configuration
    from loraseg.train.base_segmenter import BaseTrainingTask, train_base

    options = {"data": arguments.data, "output": arguments.out, "base": arguments.base}
    # JSON keeps a path such as 2026 or a:b a string; overrides are parsed as YAML.
    overrides = [f"{key}={json.dumps(value)}" for key, value in options.items() if value]
    task = configuration.load(
        BaseTrainingTask, arguments.config, [*overrides, *arguments.overrides]
    )
    result = train_base(task, _ProgressPrinter())
    scores = ", ".join(f"{name} {100 * value:.1f}" for name, value in result.metrics.items())
    print_line(f"{result.path}  sha256 {result.digest}  {scores}")
    if result.skipped:
        print_line("nothing to do: the file is the result of the same task")
    return 0


class _ProgressPrinter:
    """Prints progress on stderr every ten seconds."""

    def __init__(self) -> None:
        self._printed_at = 0.0

    def __call__(self, progress: "Progress") -> None:
        now = time.monotonic()
        if now - self._printed_at < _PRINT_INTERVAL_S:
            return
        self._printed_at = now
        sys.stderr.write(f"step {progress.step} of {progress.steps}  loss {progress.loss:.4f}\n")
