"""How fast models train: all frameworks side by side, and what the machine would allow."""
