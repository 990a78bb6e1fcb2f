"""Pages about what was run: one HTML file that needs nothing else."""
