"""Selection of the layers that get an adapter: by model, by a layer report, or at random."""
