"""HTTP that gateway, functions and the local broker share: bounds on connections, and what a target may name."""
