"""Readers of the published data sets, one short module per family."""
