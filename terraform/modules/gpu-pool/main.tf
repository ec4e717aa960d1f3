# GPU nodes, from zero (unless nodes_warm says otherwise): one starts for a pod that waits, and goes some ten minutes after the last.

resource "google_container_node_pool" "this" {
  project  = var.project
  cluster  = var.cluster
  name     = var.name
  location = var.location

  node_locations = var.zones

  autoscaling {
    total_min_node_count = var.nodes_warm # total_*: over all zones, not in each
    total_max_node_count = var.nodes_max
    location_policy      = "ANY" # wherever there is a GPU
  }

  # Machines beside each other, for pods that are on several: a pod's own GPUs are in one machine anyway.
  dynamic "placement_policy" {
    for_each = var.compact_placement ? ["COMPACT"] : []

    content {
      type = placement_policy.value
    }
  }

  management {
    auto_repair  = true
    auto_upgrade = true
  }

  node_config {
    machine_type     = var.machine_type
    image_type       = "COS_CONTAINERD"
    service_account  = var.nodes_account
    oauth_scopes     = ["https://www.googleapis.com/auth/cloud-platform"]
    spot             = var.provisioning == "spot"
    flex_start       = var.provisioning == "flex" ? true : null
    max_run_duration = var.provisioning == "flex" ? "${var.flex_max_run_s}s" : null
    disk_size_gb     = var.disk_size_gb

    guest_accelerator {
      type  = var.accelerator
      count = var.accelerators_per_node

      gpu_driver_installation_config {
        gpu_driver_version = "LATEST"
      }

      dynamic "gpu_sharing_config" {
        for_each = var.time_sharing_clients > 1 ? [var.time_sharing_clients] : []

        content {
          gpu_sharing_strategy       = "TIME_SHARING"
          max_shared_clients_per_gpu = gpu_sharing_config.value
        }
      }
    }

    gcfs_config {
      enabled = true # an image of gigabytes is there in seconds
    }

    # Images on a disk that comes with the node, for those that are too large to be streamed; it does not make nodes start later.
    dynamic "secondary_boot_disks" {
      for_each = var.image_disk == "" ? [] : [var.image_disk]

      content {
        disk_image = secondary_boot_disks.value
        mode       = "CONTAINER_IMAGE_CACHE"
      }
    }

    # emptyDirs, and with them the cache of weights, on disks inside the machine.
    dynamic "ephemeral_storage_local_ssd_config" {
      for_each = var.local_ssds == 0 ? [] : [var.local_ssds]

      content {
        local_ssd_count = ephemeral_storage_local_ssd_config.value
      }
    }

    gvnic {
      enabled = true
    }

    workload_metadata_config {
      mode = "GKE_METADATA"
    }

    shielded_instance_config {
      enable_secure_boot          = true # needs Google's signed drivers, which LATEST is
      enable_integrity_monitoring = true
    }

    taint {
      key    = "nvidia.com/gpu"
      value  = "present"
      effect = "NO_SCHEDULE"
    }

    labels = { "knapper.dev/pool" = var.name }
  }

  lifecycle {
    precondition {
      condition     = !var.compact_placement || length(var.zones) == 1
      error_message = "compact_placement needs one zone: machines of two are never close."
    }

    ignore_changes = [node_config[0].taint, node_config[0].resource_labels] # GKE adds its own for GPUs and Spot
  }
}
