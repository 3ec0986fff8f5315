"""Measures speed: `cascade bench`."""
