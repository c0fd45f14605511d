"""What the suites share: backends in other processes, and the problems they are tested on."""
