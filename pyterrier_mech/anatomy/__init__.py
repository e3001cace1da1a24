"""A Hugging Face module as a map of sites."""
