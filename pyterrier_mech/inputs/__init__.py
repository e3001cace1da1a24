"""From texts to tensors."""
