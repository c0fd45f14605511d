"""Clocks, memory and the facts about a run's surroundings."""
