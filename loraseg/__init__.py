"""loraseg: adapters for segmentation, trained per domain, retrieved and fused per image."""
