"""Training: of a draft for any target (``specdec.training.distil``), and of the bundled pair (``.pair``)."""
