"""Laws of rows of logits, and draws from them by counter noise."""
