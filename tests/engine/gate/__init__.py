"""A gate for the GPU's side of the engine without a GPU: real sizes on torch's meta device, counted."""
