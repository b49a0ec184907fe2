"""Which layers an adapter acts on: by model, by a ranked layer report, or by share."""
