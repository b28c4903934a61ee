"""Local training of clients: batches, truncations, optimiser steps."""
