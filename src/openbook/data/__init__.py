"""Text in, tensors out: where rows come from, what they mean, how they are batched."""
