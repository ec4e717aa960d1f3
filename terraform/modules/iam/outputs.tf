output "reward_audience" {
  description = "What reward's credential file names as audience."
  value       = "//iam.googleapis.com/${google_iam_workload_identity_pool_provider.cluster.name}"
}
