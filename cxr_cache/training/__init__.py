"""Fitting heads and the last blocks of an encoder, fold by fold."""
