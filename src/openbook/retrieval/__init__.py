"""Text in, neighbours out: sentences, BM25, and the contextualized corpus built with it."""
