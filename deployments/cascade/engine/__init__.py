"""One language model on one device: cache, batching, and the loop that steps it."""
