mock_provider "google" {
  mock_data "google_container_cluster" {
    defaults = {
      control_plane_endpoints_config = [{ dns_endpoint_config = [{ endpoint = "example.gke.goog" }] }]
    }
  }
}

mock_provider "helm" {}

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
}

run "kourier_is_not_reached_from_outside" {
  command = plan

  assert {
    condition     = one([for object in local.installed : object.spec.ingress.kourier["service-type"] if object.kind == "KnativeServing"]) == "ClusterIP"
    error_message = "the load balancer of 30-functions is the only way in"
  }

  assert {
    condition     = one([for object in local.installed : object.spec.config.autoscaler["allow-zero-initial-scale"] if object.kind == "KnativeServing"]) == "true"
    error_message = "what knative/cluster says must arrive"
  }
}
