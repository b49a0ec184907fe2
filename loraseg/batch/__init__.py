"""Resumable batch jobs over a store: segment a bucket of images, synthesize image/label pairs."""
