"""What a run tells its user: events, progress, tables, pictures, the page, and trackers."""
