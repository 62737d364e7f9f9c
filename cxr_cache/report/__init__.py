"""What people look at: pages, plots and model cards."""
