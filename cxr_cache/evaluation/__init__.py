"""How good a run is: figures, comparisons and audits of its data."""
