"""From logits to probabilities to tokens, without speculation."""
