"""What hangs on transformers."""
