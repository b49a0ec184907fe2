"""The models of the miniature world: how each is built, pretrained and checked."""
