"""Quality, measured: the embedded model against the oracle of its world."""
