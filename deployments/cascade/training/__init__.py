"""Trains the shipped pair of models; nothing that serves imports it."""
