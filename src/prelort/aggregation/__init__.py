"""Accumulators: weighted means of adapters of mixed ranks, one reply at a time."""
