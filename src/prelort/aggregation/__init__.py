"""Accumulators that the methods share: means of rank dimensions, and means of products."""
