"""Archives of finished studies: made (`archive.py`, `crate.py`), and checked (`verify.py`)."""
