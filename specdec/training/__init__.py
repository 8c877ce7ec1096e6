"""Training: of a draft for any target (``specdec.training.distil``), of adaptive tokens (``.adaptive``), and of the
bundled pair (``.pair``)."""
