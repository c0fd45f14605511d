"""What to run: the models of recipes, experiments, corpora and configuration; loading them."""
