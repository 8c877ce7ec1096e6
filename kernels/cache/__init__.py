"""Writing a cache of keys and values."""
