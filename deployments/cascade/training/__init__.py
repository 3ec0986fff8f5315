"""Trains the pair of models in `cascade.demo`; nothing that serves imports it."""
