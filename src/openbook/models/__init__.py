"""Batch in, Outputs out: pretrained encoders and students of any shape."""
