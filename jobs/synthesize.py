"""Generate filtered image/label pairs from masks.

ray job submit --working-dir . -- python -m jobs.synthesize masks=s3://bucket/city \
    output=s3://bucket/pairs adapters="[s3://bucket/generators#city]" \
    segmenter=s3://bucket/segmenter.safetensors

Safe to kill at any point and to run again: a run generates what is missing. With append=true a
complete output grows: more masks, or more images of each (sampling.images). With local=true the job
needs no Ray.

Exit status: 0 done (masks that cannot be used are rows with a reason), 1 the work failed and can be
run again, 2 a mistake in the config.
"""

import sys
from dataclasses import dataclass, field

from actors.executor import ActorPoolConfig, RayExecutor
from loraseg import config as configuration
from loraseg.batch.core.executor import LocalExecutor
from loraseg.batch.synthesize.config import SynthesisConfig
from loraseg.batch.synthesize.run import SynthesisSummary, synthesize

_MAX_REJECTED_SHOWN = 10


@dataclass(frozen=True, kw_only=True, slots=True)
class Config:
    """The synthesis, and where it runs.

    Attributes:
        synthesis: Its fields are keys of this config.
        generators: What each worker that generates images takes on Ray; its ``cpus`` set the
            threads with ``local`` too.
        voters: What each worker that filters labels takes on Ray.
        local: Generate in this process, without Ray.
    """

    synthesis: SynthesisConfig = field(metadata=configuration.INLINED)
    generators: ActorPoolConfig = field(default_factory=ActorPoolConfig)
    voters: ActorPoolConfig = field(default_factory=lambda: ActorPoolConfig(cpus=0.5))
    local: bool = False


def main(config: Config) -> int:
    """Run the job and return its exit status."""
    if config.local:
        executor = LocalExecutor(config.generators.threads)
    else:
        executor = RayExecutor(config.generators, config.voters)
    summary = synthesize(config.synthesis, executor)
    sys.stdout.write(_format_summary(config.synthesis.output, summary))
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
