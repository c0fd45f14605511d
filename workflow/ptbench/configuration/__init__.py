"""What to run: pydantic models of recipes, experiments, corpora and the configuration, and loading."""
