"""Converter between scGPT checkpoints and native models."""
