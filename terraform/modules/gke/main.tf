# A private cluster, reached by its DNS endpoint (which asks for Google credentials, and needs no bastion), with one CPU pool
# for Knative and the gateway, and one of gVisor nodes for reward, from zero.
#
# The CPU pool is made with the cluster, in place of the default pool: the argument that removed that one is deprecated. A
# pool inside of a cluster would fight with those beside it, so Terraform leaves it alone afterwards:
#   gcloud container node-pools update cpu --cluster NAME --location LOCATION --enable-autoscaling --total-max-nodes N

data "google_project" "this" {
  project_id = var.project
}

resource "google_service_account" "nodes" {
  project      = var.project
  account_id   = "${var.name}-nodes"
  display_name = "Nodes of ${var.name}: logs, metrics, images; nothing of the workloads"
}

resource "google_project_iam_member" "nodes" {
  for_each = toset(["roles/container.defaultNodeServiceAccount", "roles/artifactregistry.reader"])

  project = var.project
  role    = each.value
  member  = "serviceAccount:${google_service_account.nodes.email}"
}

resource "google_container_cluster" "this" {
  project             = var.project
  name                = var.name
  location            = var.location
  deletion_protection = var.deletion_protection

  network    = var.network
  subnetwork = var.subnetwork

  ip_allocation_policy {
    cluster_secondary_range_name  = "pods"
    services_secondary_range_name = "services"
  }

  node_pool {
    name               = "cpu"
    initial_node_count = var.cpu_nodes_min

    autoscaling {
      total_min_node_count = var.cpu_nodes_min
      total_max_node_count = var.cpu_nodes_max
      location_policy      = "ANY"
    }

    management {
      auto_repair  = true
      auto_upgrade = true
    }

    node_config {
      machine_type    = var.cpu_machine_type
      image_type      = "COS_CONTAINERD"
      service_account = google_service_account.nodes.email
      oauth_scopes    = ["https://www.googleapis.com/auth/cloud-platform"]

      gcfs_config {
        enabled = true # images are streamed
      }

      workload_metadata_config {
        mode = "GKE_METADATA"
      }

      shielded_instance_config {
        enable_secure_boot          = true
        enable_integrity_monitoring = true
      }
    }
  }

  release_channel {
    channel = var.release_channel
  }

  private_cluster_config {
    enable_private_nodes    = true
    enable_private_endpoint = true
  }

  # An empty list: no address reaches the control plane by IP. The DNS endpoint asks for IAM.
  master_authorized_networks_config {
    gcp_public_cidrs_access_enabled = false
  }

  control_plane_endpoints_config {
    dns_endpoint_config {
      allow_external_traffic = true
    }
  }

  workload_identity_config {
    workload_pool = "${var.project}.svc.id.goog"
  }

  datapath_provider = "ADVANCED_DATAPATH" # enforces network policies, egress too

  addons_config {
    gcs_fuse_csi_driver_config {
      enabled = true # weights
    }

    dns_cache_config {
      enabled = true
    }
  }

  gateway_api_config {
    channel = "CHANNEL_STANDARD" # how the gateway is exposed
  }

  cluster_autoscaling {
    autoscaling_profile = "OPTIMIZE_UTILIZATION" # GPU nodes go sooner after their last pod
  }

  monitoring_config {
    enable_components = ["SYSTEM_COMPONENTS"]

    managed_prometheus {
      enabled = true
    }
  }

  logging_config {
    enable_components = ["SYSTEM_COMPONENTS", "WORKLOADS"]
  }

  cost_management_config {
    enabled = true # cost by namespace and label in the billing export
  }

  enable_shielded_nodes       = true
  enable_intranode_visibility = true

  binary_authorization {
    evaluation_mode = var.binary_authorization
  }

  master_auth {
    client_certificate_config {
      issue_client_certificate = false
    }
  }

  resource_labels = var.labels

  lifecycle {
    ignore_changes = [node_pool]
  }

  depends_on = [google_project_iam_member.nodes]
}

resource "google_container_node_pool" "sandbox" {
  project  = var.project
  cluster  = google_container_cluster.this.id
  name     = "sandbox"
  location = var.location

  autoscaling {
    total_min_node_count = 0
    total_max_node_count = var.sandbox_nodes_max
    location_policy      = "ANY"
  }

  management {
    auto_repair  = true
    auto_upgrade = true
  }

  node_config {
    machine_type    = var.cpu_machine_type
    image_type      = "COS_CONTAINERD"
    service_account = google_service_account.nodes.email
    oauth_scopes    = ["https://www.googleapis.com/auth/cloud-platform"]

    sandbox_config {
      type = "gvisor"
    }

    gcfs_config {
      enabled = true
    }

    workload_metadata_config {
      mode = "GKE_METADATA"
    }

    shielded_instance_config {
      enable_secure_boot          = true
      enable_integrity_monitoring = true
    }
  }

  lifecycle {
    ignore_changes = [node_config[0].taint, node_config[0].labels] # GKE adds its own to sandboxed pools
  }
}
