"""Training: recipes, the loop, checkpoints, and one adapter as one unit of work.

Why the loop is our own: a step must depend on nothing but its number and the state in the
checkpoint, so that adapters come out the same however often a worker is lost.
"""

__all__: list[str] = []
