# H100s on Spot, two CPU nodes that always run, and buckets that destroy refuses to empty.
region              = "us-central1"
name                = "knapper"
cpu_nodes_min       = 2
deletion_protection = true

gpu_pools = {
  h100 = {
    machine_type = "a3-highgpu-1g"
    accelerator  = "nvidia-h100-80gb"
    zones        = ["us-central1-a", "us-central1-b", "us-central1-c"]
    nodes_max    = 5
  }
}

monthly_budget = 2000
