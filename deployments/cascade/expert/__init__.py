"""The expert tier: verifies blocks, many sessions in one forward pass."""
