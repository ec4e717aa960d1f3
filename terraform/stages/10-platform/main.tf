# 10-platform: everything of Google Cloud. Its own state, since the next stages need a cluster that answers.

terraform {
  required_version = ">= 1.8"

  backend "gcs" {} # terraform init -backend-config=bucket=... -backend-config=prefix=10-platform

  required_providers {
    google = {
      source  = "hashicorp/google"
      version = ">= 7.22, < 9"
    }
    google-beta = { # only there can a service's own account be made
      source  = "hashicorp/google-beta"
      version = ">= 7.22, < 9"
    }
  }
}

provider "google-beta" {
  project = var.project
  region  = var.region
}

provider "google" {
  project = var.project
  region  = var.region
}

locals {
  location = var.location == "" ? "${var.region}-b" : var.location
  labels   = { app = "knapper", instance = var.name }
}

resource "google_project_service" "this" {
  for_each = toset([
    "artifactregistry.googleapis.com", "billingbudgets.googleapis.com", "certificatemanager.googleapis.com",
    "cloudresourcemanager.googleapis.com", "compute.googleapis.com", "container.googleapis.com", "dns.googleapis.com",
    "iam.googleapis.com", "iamcredentials.googleapis.com", "monitoring.googleapis.com", "pubsub.googleapis.com",
    "storage.googleapis.com", "sts.googleapis.com",
  ])

  project            = var.project
  service            = each.value
  disable_on_destroy = false # others may use it
}

module "network" {
  source = "../../modules/network"

  project = var.project
  region  = var.region
  name    = var.name

  depends_on = [google_project_service.this]
}

module "gke" {
  source = "../../modules/gke"

  project             = var.project
  location            = local.location
  name                = var.name
  network             = module.network.network
  subnetwork          = module.network.subnetwork
  cpu_nodes_min       = var.cpu_nodes_min
  deletion_protection = var.deletion_protection
  labels              = local.labels

  depends_on = [google_project_service.this]
}

module "gpu_pool" {
  source   = "../../modules/gpu-pool"
  for_each = var.gpu_pools

  project               = var.project
  cluster               = module.gke.cluster
  location              = local.location
  name                  = each.key
  nodes_account         = module.gke.nodes_account
  zones                 = each.value.zones
  machine_type          = each.value.machine_type
  accelerator           = each.value.accelerator
  accelerators_per_node = each.value.accelerators_per_node
  compact_placement     = each.value.compact_placement
  nodes_max             = each.value.nodes_max
  provisioning          = each.value.provisioning
  time_sharing_clients  = each.value.time_sharing_clients
  nodes_warm            = each.value.nodes_warm
  image_disk            = each.value.image_disk
  local_ssds            = each.value.local_ssds
}

resource "google_artifact_registry_repository" "images" {
  project       = var.project
  location      = var.region # beside the nodes, or images cannot be streamed
  repository_id = var.name
  format        = "DOCKER"
  description   = "Images of ${var.name}"
  labels        = local.labels

  docker_config {
    immutable_tags = true # a tag is a release; rolling back to it must give what it was
  }

  cleanup_policies {
    id     = "untagged"
    action = "DELETE"

    condition {
      tag_state  = "UNTAGGED"
      older_than = "2592000s"
    }
  }

  depends_on = [google_project_service.this]
}

module "storage" {
  source = "../../modules/storage"

  project       = var.project
  prefix        = "${var.project}-${var.name}"
  location      = var.region
  force_destroy = var.force_destroy
  labels        = local.labels

  depends_on = [google_project_service.this]
}

module "events" {
  source = "../../modules/events"

  project = var.project
  region  = var.region
  name    = var.name
  bucket  = module.storage.exchange
  labels  = local.labels

  depends_on = [google_project_service.this]
}

module "iam" {
  source = "../../modules/iam"

  project         = var.project
  project_number  = module.gke.project_number
  name            = var.name
  issuer          = module.gke.issuer
  state_bucket    = module.storage.state
  exchange_bucket = module.storage.exchange
  models_bucket   = module.storage.models
  subscription    = module.events.subscription

  depends_on = [google_project_service.this]
}

module "observability" {
  source = "../../modules/observability"

  project         = var.project
  name            = var.name
  billing_account = var.billing_account
  monthly_budget  = var.monthly_budget
  email           = var.email

  depends_on = [google_project_service.this]
}
