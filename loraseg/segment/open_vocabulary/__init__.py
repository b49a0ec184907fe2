"""Open-vocabulary segmentation: CAT-Seg, prediction, tiled inference, losses."""
