"""What `scripts/gpu_check.py` measures: sections, and what they share."""
