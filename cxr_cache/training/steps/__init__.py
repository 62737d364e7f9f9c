"""How a head takes a training step: its gradient, its optimiser, and both compiled into one."""
