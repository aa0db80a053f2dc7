"""Learning from a step: experience, reward estimates, losses, both trainers, monitor."""
