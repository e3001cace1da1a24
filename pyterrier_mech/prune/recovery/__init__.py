"""What repairs a pruned ranker."""
