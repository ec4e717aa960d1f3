"""The gateway: speaks the Tinker protocol, stores what it accepts, answers at once. It never computes."""
