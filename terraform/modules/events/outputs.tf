output "subscription" {
  description = "What the gateway pulls: projects/PROJECT/subscriptions/NAME."
  value       = google_pubsub_subscription.uploads.id
}

output "dead_subscription" {
  description = "What could not be delivered, for 31 days."
  value       = google_pubsub_subscription.dead.id
}
