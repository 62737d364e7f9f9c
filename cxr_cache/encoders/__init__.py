"""A name to a frozen tower, and pixels to its features."""
