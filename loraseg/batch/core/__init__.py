"""What the batch jobs share: run state, work units, executors, and rules for their outputs."""
