"""Speculative cascades: a drafter writes, an expert judges, a rule decides whose law a token follows."""
