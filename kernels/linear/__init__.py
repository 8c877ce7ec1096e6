"""Linear layers of few rows."""
