"""The models of the miniature world: construction, pretraining and acceptance checks."""
