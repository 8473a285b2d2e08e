"""Splits, scores, leakage, verdicts and reports: every method beside its baselines on the same held-out cells."""
