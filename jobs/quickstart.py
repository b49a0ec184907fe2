"""The whole workflow on the miniature world: train adapters, publish a library, write a report.

python -m jobs.quickstart [output=FOLDER] [seed=N]
"""

import logging
import sys
from dataclasses import dataclass
from pathlib import Path

from actors.resources import ResourceConfig, connect
from actors.tasks import ordered_map
from actors.train_adapters import train_adapters
from loraseg import config as configuration
from loraseg.evaluate.output import write_results
from loraseg.evaluate.results import results_table
from loraseg.evaluate.run import EvaluationConfig, EvaluationDomain, evaluate
from loraseg.miniature.world.dataset import write_world
from loraseg.miniature.world.domains import DOMAINS, unseen_domains
from loraseg.train import manifest
from loraseg.train.tables import result_table

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class Config:
    """Output folder, families of domains, images per domain for training and validation, seed."""

    output: str = "runs/quickstart"
    families: tuple[str, ...] = ("night", "snow", "drawing", "thermal", "above")
    train: int = 60
    val: int = 16
    seed: int = 0


def main(config: Config) -> int:
    """Draw the domains, train their adapters, score them leave-one-out, print the results."""
    chosen = unseen_domains(config.families)
    output, placement = Path(config.output).resolve(), ResourceConfig()
    logger.info("1/3 drawing %d domains of the miniature world", len(chosen))
    world = output / "world"
    folders = write_world(world, chosen, train=config.train, val=config.val, seed=config.seed)

    logger.info("2/3 training one adapter per domain on Ray")
    connect()
    domains = tuple(manifest.TrainingDomain(name=name, data=str(folders[name])) for name in chosen)
    library = str(output / "library")
    work = manifest.TrainingManifest(
        library=library, checkpoints=str(output / "state"), seed=config.seed, domains=domains
    )
    outcomes = list(train_adapters(work.tasks(), placement))
    sys.stdout.write(result_table([o.result or (o.name, o.error or "") for o in outcomes]))
    if any(outcome.result is None for outcome in outcomes):
        return 1

    logger.info("3/3 scoring every domain without its own adapter")
    scored = tuple(
        EvaluationDomain(name=n, data=str(folders[n]), family=DOMAINS[n].family) for n in chosen
    )
    report = output / "report"
    evaluation = EvaluationConfig(
        library=library, output=str(report), domains=scored, candidates=chosen
    )
    results = evaluate(evaluation, ordered_map(placement, "evaluate domain"))
    page = write_results(results, evaluation.output)
    image = next((world / chosen[0] / "images" / "val").glob("*.png"))
    sys.stdout.write(
        f"{results_table(results)}\nreport: {page}\n"
        f'next: .venv/bin/loraseg segment {image} --classes "road, vehicle, pedestrian, sky" '
        f"--library {library} --out {output / 'segmented'}\n"
    )
    return 0


if __name__ == "__main__":
    configuration.main(main, Config, description=__doc__)
