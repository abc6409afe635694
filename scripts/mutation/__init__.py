"""What `mutate_objectives.py` is made of."""
