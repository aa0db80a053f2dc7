"""What is learned from a step: experience, estimates, losses, both trainers, monitor."""
