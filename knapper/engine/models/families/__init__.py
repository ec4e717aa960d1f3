"""The architectures of the native decoder: a file each, or one for close relatives. `models.registry` finds them."""
