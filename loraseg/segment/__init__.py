"""Open-vocabulary segmentation: model, loss, prediction, metrics."""
