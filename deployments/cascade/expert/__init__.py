"""The expert tier: verifies blocks in one forward pass each."""
