"""Files that survive a crash: checkpoints, locks, JSON Lines, and checked reading."""
