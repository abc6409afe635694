"""What the studies share: running the missing trainings, reading their records, intervals over seeds, curves."""
