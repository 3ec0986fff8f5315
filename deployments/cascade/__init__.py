"""A drafter writes, an expert judges, and a rule decides whose law each token follows."""
