"""The HTTP endpoint without Ray: orders, limits, tokens, replies, the API and its page.

Why apart from ``actors``: the API is an ASGI app over an :class:`~loraseg.serving.engine.Engine`.
Ray's deployments are one engine; the models in this process are another, so that the API is tested,
and can be embedded, without a cluster.
"""

__all__: list[str] = []
