"""Similarity of synthetic and real images: CMMD, FID, coverage and near duplicates."""
