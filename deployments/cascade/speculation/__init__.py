"""The mathematics: rules, targets, verification and coins, as pure functions."""
