"""The miniature street world: scenes with exact masks and captions, rendered from a seed."""
