"""The miniature street world: scenes with exact masks and captions, drawn from a seed."""
