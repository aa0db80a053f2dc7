"""Files that survive a crash: checkpoints, locks, JSON Lines, checked reading."""
