"""Commands: options to one call and one report."""
