"""Leave-one-out evaluation of a library, and measures of synthetic images.

K and tau are chosen by cross-validation over domains, and related domains (families) stay in one
fold: values chosen on the scored domains or on similar ones would be biased towards the test data.
"""

__all__: list[str] = []
