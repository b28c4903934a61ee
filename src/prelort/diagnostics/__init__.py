"""What a round did to the products: noise, drift, energy of ranks; nothing here changes a run."""

from prelort.diagnostics.diagnosis import observer as observer
