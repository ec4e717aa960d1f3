"""HTTP that gateway, functions and the local activator share: bounds on connections, and what a target may name."""
