"""From sources to packed batches: vocabulary, shards, order, tokens."""
