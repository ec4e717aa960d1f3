mock_provider "google" {
  mock_data "google_container_cluster" {
    defaults = {
      control_plane_endpoints_config = [{ dns_endpoint_config = [{ endpoint = "example.gke.goog" }] }]
    }
  }
}

mock_provider "helm" {}
mock_provider "local" {}

variables {
  platform = {
    project         = "example-project"
    region          = "us-central1"
    location        = "us-central1-b"
    name            = "knapper"
    state_bucket    = "example-project-knapper-state"
    exchange_bucket = "example-project-knapper-exchange"
    models_bucket   = "example-project-knapper-models"
    subscription    = "projects/example-project/subscriptions/knapper-uploads"
    reward_audience = "//iam.googleapis.com/projects/1/locations/global/workloadIdentityPools/knapper-reward/providers/cluster"
  }
  registry = "us-central1-docker.pkg.dev/example-project/knapper"
  release  = "v1"
}

run "the_overlay_gets_this_projects_names" {
  command = plan

  assert {
    condition     = strcontains(local_file.kustomization.content, "KNAPPER_STORE=gs://example-project-knapper-state")
    error_message = "the store is the state bucket"
  }

  assert {
    condition     = strcontains(local_file.kustomization.content, "us-central1-docker.pkg.dev/example-project/knapper/train-step")
    error_message = "images come from the registry"
  }
}

run "a_moving_tag_is_refused" {
  command = plan

  variables {
    release = "latest"
  }

  expect_failures = [var.release]
}
