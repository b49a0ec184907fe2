"""Training: recipes, the loop, checkpoints, and adapters as units of work.

Why the loop is our own: a step must depend on nothing but its number and the state in the
checkpoint, so that adapters come out the same however often a worker is lost.

Why pairs act through a product of our own and not through peft's layers: a step takes a sixth less
time, and several adapters can take turns on one frozen model. Gradients are those of peft, which
the tests compare in float64; files are peft's own.

Why one unit of work an adapter unless they share frozen work: Ray keeps its workers, so the start
of a process is paid once a worker either way. A sweep over one dataset that leaves CLIP as it is
shares CLIP's features.

Why generators keep latents and encoded prompts in the store: they never change, a VAE and two text
encoders would cost more time and memory than the adapter's own step, and every recipe, rank and
seed on the same images finds them there.
"""

__all__: list[str] = []
