"""One file per framework, all of one contract. Only these files import a framework."""
