"""The HDF5 feature store, and what writes, checks and reads it."""
