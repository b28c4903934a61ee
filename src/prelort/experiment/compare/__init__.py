"""`prelort compare`: methods x seeds x settings, a run for each cell."""
