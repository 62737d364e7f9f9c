"""Cache chest X-ray embeddings once, train on them from then on."""

__version__ = "0.1.0"
