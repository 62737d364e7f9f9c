"""What the readers of published data sets promise."""
