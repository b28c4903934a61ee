"""How good a model is: pure scores, and their measurement at every prefix of an adapter."""
