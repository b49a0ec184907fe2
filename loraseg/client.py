"""Talk to an endpoint."""

__all__: list[str] = []
