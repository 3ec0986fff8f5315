"""The draft-verify loop, and how it reaches the two tiers."""
