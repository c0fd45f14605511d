"""What the benchmark can measure, by name; the command line imports it before all else."""

# Names of models, and the recipes that they are.
MODELS = {
    "small": "zaremba-small", "medium": "zaremba-medium", "large": "zaremba-large",
    "mos": "speed-mos", "bmlg": "zhang-bmlg", "awd-lstm": "awd-lstm",
}  # fmt: skip
# What our own backends are measured as, and the recipe's keys that say so. The bound is that of
# float32 products, so the share of it can be above 1 in bfloat16.
OWN: dict[str, dict[str, str]] = {
    "stock": {"implementation": "stock"},
    "tuned": {"implementation": "tuned"},
    "bfloat16": {"implementation": "stock", "precision": "bfloat16"},
}
