"""Whole jobs: a store to a finished run, with its figures, page and card."""
