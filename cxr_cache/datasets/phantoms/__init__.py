"""Synthetic chest X-rays that are drawn, for demonstrations and tests."""
