"""The HTTP API: routes, request parameters, authentication, errors and OpenAPI."""
