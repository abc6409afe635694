"""Faults of the weight push and of the engine's process, for `replay_faults`."""
