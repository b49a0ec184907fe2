"""HTML reports: one file each, rendered from templates."""
