"""MatchMask++: a segmenter, pseudo-masks of unlabelled images, then pairs from both."""
