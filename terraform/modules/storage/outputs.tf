output "state" {
  description = "Name of the bucket of state."
  value       = google_storage_bucket.state.name
}

output "exchange" {
  description = "Name of the bucket of inbox and outputs."
  value       = google_storage_bucket.exchange.name
}

output "models" {
  description = "Name of the bucket of base models."
  value       = google_storage_bucket.models.name
}
