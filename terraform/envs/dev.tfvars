# A small box: one L4 at a time on Spot, from zero. terraform -chdir=terraform/stages/10-platform apply -var-file=../../envs/dev.tfvars -var project=...
region        = "us-central1"
name          = "knapper-dev"
force_destroy = true

gpu_pools = {
  l4 = {
    machine_type = "g2-standard-8"
    accelerator  = "nvidia-l4"
    zones        = ["us-central1-b", "us-central1-c"]
    nodes_max    = 2
  }
}

monthly_budget = 100
