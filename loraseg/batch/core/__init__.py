"""What every batch job shares: run state, work units and content digests."""
