"""Choosing the rank at a site: what each rank costs in memory and in bytes sent."""
