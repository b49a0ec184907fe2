"""The HTTP endpoint without Ray: engines, limits, tokens, the API and its page.

The API is an ASGI app over an :class:`~loraseg.serving.engine.Engine`. One engine runs the models
in this process, for ``loraseg serve`` and tests; the stages of the engine in ``actors.serve`` are
Ray deployments.
"""

__all__: list[str] = []
