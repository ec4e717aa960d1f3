output "platform" {
  description = "What the next stages ask for: terraform output -json platform."
  value = {
    project         = var.project
    region          = var.region
    location        = local.location
    name            = module.gke.name
    state_bucket    = module.storage.state
    exchange_bucket = module.storage.exchange
    models_bucket   = module.storage.models
    subscription    = module.events.subscription
    reward_audience = module.iam.reward_audience
  }
}

output "registry" {
  description = "Where images are pushed to."
  value       = "${var.region}-docker.pkg.dev/${var.project}/${google_artifact_registry_repository.images.repository_id}"
}

output "inbox" {
  description = "Where jobs are dropped: gcloud storage cp job.yaml prompts.jsonl INBOX/TENANT/JOB/."
  value       = "gs://${module.storage.exchange}/inbox"
}

output "models" {
  description = "Where weights of base models lie, a directory each."
  value       = "gs://${module.storage.models}"
}

output "credentials_command" {
  description = "Writes a kubeconfig for this cluster."
  value       = "gcloud container clusters get-credentials ${module.gke.name} --location ${local.location} --project ${var.project} --dns-endpoint"
}
