"""Outputs in, a number out: the losses, the objective that weighs them, and teachers live or recorded."""
