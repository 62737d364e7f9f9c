"""What was trained, kept in a run folder, and its use on images."""
