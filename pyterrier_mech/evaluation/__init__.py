"""Uncertainty, comparison, measures, efficiency."""
