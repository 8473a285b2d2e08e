"""Converter between scBERT checkpoints and native models."""
