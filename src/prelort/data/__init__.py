"""Data: where rows come from, and which client holds which."""
