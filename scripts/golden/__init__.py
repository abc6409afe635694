"""What `check_objectives.py` compares with files of reference numbers: named objectives (cases) and other files."""
