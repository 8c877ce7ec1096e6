"""Attention of new tokens over a cache, and which of them see which."""
