# An upload rings the gateway: notification, topic, and a subscription that it pulls. Nothing public listens.

data "google_storage_project_service_account" "this" {
  project = var.project
}

# Pub/Sub's own account exists once somebody has asked for it: in a new project, we.
resource "google_project_service_identity" "pubsub" {
  provider = google-beta

  project = var.project
  service = "pubsub.googleapis.com"
}

resource "google_pubsub_topic" "uploads" {
  project                    = var.project
  name                       = "${var.name}-uploads"
  message_retention_duration = "604800s"
  labels                     = var.labels

  message_storage_policy {
    allowed_persistence_regions = [var.region]
  }
}

resource "google_pubsub_topic_iam_member" "storage" {
  project = var.project
  topic   = google_pubsub_topic.uploads.id
  role    = "roles/pubsub.publisher"
  member  = "serviceAccount:${data.google_storage_project_service_account.this.email_address}"
}

resource "google_storage_notification" "uploads" {
  bucket             = var.bucket
  topic              = google_pubsub_topic.uploads.id
  payload_format     = "JSON_API_V1"
  event_types        = ["OBJECT_FINALIZE"]
  object_name_prefix = "inbox/"

  depends_on = [google_pubsub_topic_iam_member.storage]
}

resource "google_pubsub_topic" "dead" {
  project                    = var.project
  name                       = "${var.name}-uploads-dead"
  message_retention_duration = "2678400s"
  labels                     = var.labels
}

# Without a subscription a dead letter topic keeps nothing that anybody could read.
resource "google_pubsub_subscription" "dead" {
  project                    = var.project
  name                       = "${var.name}-uploads-dead"
  topic                      = google_pubsub_topic.dead.id
  message_retention_duration = "2678400s"
  labels                     = var.labels

  expiration_policy {
    ttl = ""
  }
}

resource "google_pubsub_subscription" "uploads" {
  project                      = var.project
  name                         = "${var.name}-uploads"
  topic                        = google_pubsub_topic.uploads.id
  ack_deadline_seconds         = 60
  message_retention_duration   = "604800s"
  enable_exactly_once_delivery = false # a job starts once by a record in the store; the same event twice costs a look
  labels                       = var.labels

  retry_policy {
    minimum_backoff = "1s"
    maximum_backoff = "600s"
  }

  dead_letter_policy {
    dead_letter_topic     = google_pubsub_topic.dead.id
    max_delivery_attempts = 100 # with the back-off above, over half a day
  }

  expiration_policy {
    ttl = "" # never: a month without uploads is no reason to lose the next
  }
}

# Pub/Sub itself moves what cannot be delivered: it must be able to publish there, and to acknowledge here.
resource "google_pubsub_topic_iam_member" "dead" {
  project = var.project
  topic   = google_pubsub_topic.dead.id
  role    = "roles/pubsub.publisher"
  member  = google_project_service_identity.pubsub.member
}

resource "google_pubsub_subscription_iam_member" "dead" {
  project      = var.project
  subscription = google_pubsub_subscription.uploads.id
  role         = "roles/pubsub.subscriber"
  member       = google_project_service_identity.pubsub.member
}
