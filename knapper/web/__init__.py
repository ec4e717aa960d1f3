"""HTTP shared by the gateway, the functions and the local broker: bounded connections and bodies, request targets."""
