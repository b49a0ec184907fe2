"""How close synthetic images are to real ones: CMMD, FID, coverage and near duplicates."""
