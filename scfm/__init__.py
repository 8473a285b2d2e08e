"""scfm: train, fine-tune, score and export single-cell foundation models."""
