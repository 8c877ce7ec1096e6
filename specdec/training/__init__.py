"""Training of the bundled target and draft (see ``specdec.training.pair``)."""
