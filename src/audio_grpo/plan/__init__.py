"""What a run needs of machines one does not have: compiled ahead of time, never run."""
