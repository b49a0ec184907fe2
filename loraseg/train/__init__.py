"""Training of adapters, of base segmenters and of closed-set segmenters.

:mod:`~loraseg.train.core` holds what all trainings share, the other packages one kind each;
:mod:`~loraseg.train.roles` lists the roles of adapters, :mod:`~loraseg.train.tasks` plans and runs
their tasks.

Why an own loop: a step must depend only on its number and the state in the checkpoint, so that the
result is the same however often a worker is lost.

Why LoRA is applied by an own autograd function instead of peft's layers: a step takes a sixth less
time, and several adapters can alternate on one frozen model. Tests compare the gradients with
peft's in float64; the files are peft's.

Why one task per adapter, unless adapters share frozen work: Ray reuses its workers, so grouping
saves no process starts. A sweep over one dataset that adapts nothing of CLIP shares CLIP's
features.

Why generators cache latents and encoded prompts in a store: they never change, VAE and text
encoders would cost more time and memory than the training step itself, and all recipes, ranks and
seeds on the same images share them.
"""

__all__: list[str] = []
