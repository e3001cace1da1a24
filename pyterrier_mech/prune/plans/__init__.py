"""Which units stay, under which budget."""
