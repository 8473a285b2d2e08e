"""Training: the LightningModule, its data, optimisers, callbacks and the run directory."""
