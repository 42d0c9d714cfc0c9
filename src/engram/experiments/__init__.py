"""Experiments: budgets, sweeps and what they say."""
