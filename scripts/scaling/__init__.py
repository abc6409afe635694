"""What `coord_check.py` and `lr_transfer.py` share."""
