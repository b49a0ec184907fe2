"""Turn masks into filtered image/label pairs, exactly once, whatever dies meanwhile.

ray job submit --working-dir . -- python -m jobs.synthesize masks=s3://bucket/city \
    output=s3://bucket/pairs adapters="[s3://bucket/generators#city]" \
    segmenter=s3://bucket/segmenter.safetensors

Started again after any accident it makes what is missing; with nothing missing it does nothing.
With append=true a complete output grows: more masks, or more images of each (sampling.images).

Exit status: 0 done (masks that cannot be used are rows with a reason), 1 the work failed and can be
started again, 2 a mistake in the config.
"""

import sys
from dataclasses import dataclass, field

from actors.actor_pools import ActorPoolConfig
from actors.synthesize import RaySynthesisExecutor
from loraseg import config as configuration
from loraseg.batch.synthesize.config import SynthesisConfig
from loraseg.batch.synthesize.run import SynthesisSummary, synthesize

_MAX_REJECTED_SHOWN = 10


@dataclass(frozen=True, kw_only=True, slots=True)
class Config(SynthesisConfig):
    """What is made, and what each generator and each voter takes on Ray."""

    generators: ActorPoolConfig = field(default_factory=ActorPoolConfig)
    voters: ActorPoolConfig = field(default_factory=lambda: ActorPoolConfig(cpus=0.5))


def main(config: Config) -> int:
    """Run the job; return its exit status."""
    summary = synthesize(config, RaySynthesisExecutor(config.generators, config.voters))
    sys.stdout.write(_format_summary(config.output, summary))
    return 0


def _format_summary(output: str, summary: SynthesisSummary) -> str:
    manifest = summary.manifest
    statuses = ", ".join(
        f"{count} {status}" for status, count in manifest.statuses.items() if count
    )
    lines = [f"{output}: {manifest.masks} masks, {statuses}; {summary.new_rows} new rows"]
    lines += [
        f"  not used: {name}: {reason}" for name, reason in summary.rejected[:_MAX_REJECTED_SHOWN]
    ]
    if len(summary.rejected) > _MAX_REJECTED_SHOWN:
        more = len(summary.rejected) - _MAX_REJECTED_SHOWN
        lines.append(f"  and {more} more: loraseg synth ls {output} --status bad_mask")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    configuration.main(main, Config, description=__doc__)
