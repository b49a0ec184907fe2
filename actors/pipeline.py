"""The jobs of MatchMask++ on Ray: training, pseudo-masks, synthesis."""

import hashlib
import json
from collections.abc import Sequence
from functools import lru_cache

from actors.pools import PoolPlacement
from actors.resources import Placement, connect, require_room
from actors.segmenter_training import Workers, on_ray_train
from actors.synthesis import OnRay
from actors.units import result_of, run_units
from loraseg.factory.config import SynthesisConfig
from loraseg.factory.pipeline import PipelineConfig, Result
from loraseg.factory.pseudo import PseudoConfig, PseudoMasks, chunks, finish, unlabelled
from loraseg.factory.run import synthesize
from loraseg.train.closed_work import SegmenterConfig, train_segmenters

__all__ = ["RayTools"]


class RayTools:
    """Every job writes below ``config.output``, in a folder named by its stage and inputs.

    Places in arguments and results are relative to ``config.output``.
    """

    def __init__(
        self,
        config: PipelineConfig,
        workers: Workers,
        generators: PoolPlacement,
        voters: PoolPlacement,
    ) -> None:
        """Take what is worked on, and what each job takes."""
        self._config, self._workers = config, workers
        self._generators, self._voters = generators, voters

    def train(self, place: str, synthetic: Sequence[str], reuse: str | None) -> Result:
        """Train a segmenter, and its control unless it is to be reused."""
        config = self._config
        self._join(self._workers.resources)
        wanted = SegmenterConfig(
            real=config.real,
            images=config.images,
            synthetic=tuple(self._uri(one) for one in synthetic),
            recipe=config.recipe,
            overrides=config.overrides,
            output=self._uri(place),
            reuse=None if reuse is None else self._uri(reuse),
            seed=config.seed,
        )
        results = train_segmenters(wanted, on_ray_train(self._workers))
        arms = results["arms"]
        return {
            "output": place,
            "segmenter": f"{place}/{arms['segmenter']['file']}",
            "digest": arms["segmenter"]["sha256"],
            "report": f"{place}/report.html",
            **{f"{name}_miou": arm["miou"] for name, arm in arms.items()},
        }

    def synthesize(self, place: str, masks: str | None, segmenter: str) -> Result:
        """Make pairs of the real masks, or of others."""
        config = self._config
        weighs = config.filter.method == "freemask"  # by losses on the images of the segmenter
        wanted = SynthesisConfig(
            masks=self._uri(masks) if masks else config.real,
            limit=None if masks else config.images,
            output=self._uri(place),
            base=config.base,
            adapters=config.adapters,
            segmenter=self._uri(segmenter),
            real=config.real if weighs else None,
            real_images=config.images if weighs else None,
            sampling=config.sampling,
            conditioning=config.conditioning,
            filter=config.filter,
        )
        manifest = synthesize(wanted, OnRay(self._generators, self._voters)).manifest
        return {
            "dataset": place,
            "digest": hashlib.sha256(manifest.to_bytes()).hexdigest(),
            "report": f"{place}/report.html",
            "pairs": manifest.pairs,
            "statuses": dict(manifest.statuses),
        }

    def pseudo_masks(self, place: str, segmenter: str) -> Result:
        """Segment the unlabelled images, a unit of work for every 64."""
        config = self._config
        self._join(self._voters)
        wanted = PseudoConfig(
            images=config.unlabelled,
            output=self._uri(place),
            segmenter=self._uri(segmenter),
            threshold=config.threshold,
        )
        calls = [
            (f"pseudo-masks {number}", (wanted, keys))
            for number, keys in enumerate(chunks(unlabelled(config.unlabelled)))
        ]
        refused: dict[str, str] = {}
        for _, reference in run_units(_pseudo_masks, calls, self._voters):
            refused |= result_of(reference, "making pseudo-masks")
        note = finish(wanted, refused)
        text = json.dumps(note, sort_keys=True).encode()
        return {
            "masks": place,
            "digest": hashlib.sha256(text).hexdigest(),
            "count": note["masks"],
            "refused": len(refused),
        }

    def _uri(self, place: str) -> str:
        return f"{self._config.output.rstrip('/')}/{place}"

    @staticmethod
    def _join(placement: Placement) -> None:
        require_room(placement, may_grow=not connect())


# Ray keeps its workers, and so the next unit in the same one finds the segmenter loaded.
_segmenting = lru_cache(maxsize=1)(PseudoMasks)


def _pseudo_masks(config: PseudoConfig, keys: Sequence[str]) -> dict[str, str]:
    return _segmenting(config)(keys)
