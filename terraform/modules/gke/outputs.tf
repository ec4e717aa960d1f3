output "cluster" {
  description = "The cluster's id."
  value       = google_container_cluster.this.id
}

output "name" {
  description = "The cluster's name."
  value       = google_container_cluster.this.name
}

output "nodes_account" {
  description = "The service account of nodes."
  value       = google_service_account.nodes.email
}

output "project_number" {
  description = "Of the project: part of the principals of Workload Identity."
  value       = data.google_project.this.number
}

output "issuer" {
  description = "Who signs the cluster's service account tokens."
  value       = "https://container.googleapis.com/v1/${google_container_cluster.this.id}"
}
