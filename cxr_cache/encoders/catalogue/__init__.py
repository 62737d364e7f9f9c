"""Known encoders by their short names, and the check of any encoder."""
