"""A study of several methods, seeds and settings: its numbers, tables, files and page."""
