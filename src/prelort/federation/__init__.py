"""Server and clients as Flower apps; flwr is touched in this package only."""
