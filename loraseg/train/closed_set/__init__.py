"""Training of closed-set segmenters on real and synthetic pairs."""
