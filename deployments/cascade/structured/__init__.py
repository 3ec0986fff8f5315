"""Answers that match a grammar: compiled with xgrammar, applied as a mask of tokens."""
