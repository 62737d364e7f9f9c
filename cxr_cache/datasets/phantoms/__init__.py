"""Synthetic chest X-rays that are drawn, for demonstrations and tests."""

RECIPE_FILE = "phantoms.json"
"""What tells a folder of phantoms from the collection in whose form it is."""
