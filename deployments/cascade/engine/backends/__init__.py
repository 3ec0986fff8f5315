"""The ways to run one forward pass over a ragged batch."""
