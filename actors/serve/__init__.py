"""The endpoint on Ray Serve: deployments, batched calls between them, draining and metrics."""
