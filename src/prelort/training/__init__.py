"""What one client does in a round: batches, truncations, optimiser steps."""
