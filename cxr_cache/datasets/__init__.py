"""Which images there are, what is on them, and their pixels."""
