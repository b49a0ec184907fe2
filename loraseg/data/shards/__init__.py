"""Synthetic shards: Parquet files of image/label pairs with their lineage, and their manifest."""
