"""The one training loop of all frameworks, and what a run leaves behind."""
