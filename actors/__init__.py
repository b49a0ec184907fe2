"""Ray only: places the plain callables of loraseg on a cluster."""
