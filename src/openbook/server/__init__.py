"""A student and its book over HTTP: batches by tokens, limits, a drain that loses nothing, a page to try it."""
