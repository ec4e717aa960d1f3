# Three buckets. state: everything that must not be lost, and nothing that anybody edits. exchange: what people put in and take
# out. models: weights of base models, mounted read only.

resource "google_storage_bucket" "state" {
  project                     = var.project
  name                        = "${var.prefix}-state"
  location                    = var.location # beside the GPUs: every operation waits for it
  storage_class               = "STANDARD"
  uniform_bucket_level_access = true
  public_access_prevention    = "enforced"
  force_destroy               = var.force_destroy

  # Objects are created once and never overwritten, and the collector deletes by rules of its own: versions and soft deletion
  # would only keep, and bill, what is known to be of no use.
  versioning {
    enabled = false
  }

  soft_delete_policy {
    retention_duration_seconds = 0
  }

  # No rule that deletes: it would race the collector, and a deleted fence lets a stale process write again.
  lifecycle_rule {
    condition {
      age = 1
    }

    action {
      type = "AbortIncompleteMultipartUpload"
    }
  }

  labels = var.labels
}

resource "google_storage_bucket" "exchange" {
  project                     = var.project
  name                        = "${var.prefix}-exchange"
  location                    = var.location
  storage_class               = "STANDARD"
  uniform_bucket_level_access = true
  public_access_prevention    = "enforced"
  force_destroy               = var.force_destroy

  versioning {
    enabled = true # people overwrite and delete by mistake
  }

  soft_delete_policy {
    retention_duration_seconds = 604800
  }

  lifecycle_rule {
    condition {
      days_since_noncurrent_time = 30
    }

    action {
      type = "Delete"
    }
  }

  labels = var.labels
}

resource "google_storage_bucket" "models" {
  project                     = var.project
  name                        = "${var.prefix}-models"
  location                    = var.location
  storage_class               = "STANDARD"
  uniform_bucket_level_access = true
  public_access_prevention    = "enforced"
  force_destroy               = var.force_destroy

  versioning {
    enabled = false # a model is a directory of its own name; runs depend on its bits
  }

  labels = var.labels
}
