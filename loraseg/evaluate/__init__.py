"""Score a library leave-one-out and report what came out.

Why K and tau are chosen by cross-validation over domains, families kept together: chosen on the
domains that are scored, or on their twins, they would know the answer.
"""

__all__: list[str] = []
