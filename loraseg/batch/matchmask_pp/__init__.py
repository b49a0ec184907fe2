"""MatchMask++: segmenter, pairs from real masks, pseudo-masks of unlabelled images, more pairs."""
