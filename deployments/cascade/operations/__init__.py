"""Kept for rolling updates from 0.1, whose deployments name `TierPolicy` by this path."""
