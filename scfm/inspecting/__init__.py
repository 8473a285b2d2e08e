"""What is in a shard directory, as tables in a terminal and as a page."""
