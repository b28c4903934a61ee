"""Robust aggregation: defences of a round against malicious clients, for any method."""
