"""What a run tells its user: events, live progress, tables and pictures."""
