"""How a shard directory is built: survey, plan, units, duplicates, shards; each step can be stopped and taken up."""
