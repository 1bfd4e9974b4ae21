"""What trainings on held-out images say: pairs of rows within seeds, and the page about them."""
