"""The miniature CAT-Seg: pretraining and checks."""
