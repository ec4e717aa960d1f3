mock_provider "google" {
  mock_data "google_project" {
    defaults = {
      number = "123456789012"
    }
  }
}

mock_provider "google-beta" {}

variables {
  project = "example-project"
  region  = "us-central1"

  gpu_pools = {
    l4 = {
      machine_type = "g2-standard-8"
      accelerator  = "nvidia-l4"
      zones        = ["us-central1-b"]
    }
  }
}

run "outputs_name_the_buckets" {
  command = plan

  assert {
    condition     = output.inbox == "gs://example-project-knapper-exchange/inbox"
    error_message = "the inbox is the exchange bucket's"
  }

  assert {
    condition     = output.platform.location == "us-central1-b"
    error_message = "without a location, the region's zone b"
  }
}

run "a_zone_is_no_region" {
  command = plan

  variables {
    region = "us-central1-b"
  }

  expect_failures = [var.region]
}

run "a_pool_idles_at_zero_nodes" {
  command = plan

  assert {
    condition     = alltrue([for pool in values(var.gpu_pools) : pool.nodes_warm == 0])
    error_message = "nobody pays for a GPU that nobody uses, unless they say so"
  }
}

run "a_pool_is_spot_flex_or_standard" {
  command = plan

  variables {
    gpu_pools = {
      l4 = {
        machine_type = "g2-standard-8"
        accelerator  = "nvidia-l4"
        zones        = ["us-central1-b"]
        provisioning = "cheap"
      }
    }
  }

  expect_failures = [var.gpu_pools]
}
