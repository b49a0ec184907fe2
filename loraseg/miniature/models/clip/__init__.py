"""The miniature CLIP: model, batches, pretraining and checks."""
