"""Full tensors to compressed bytes and back."""
