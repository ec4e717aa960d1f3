output "tinker_base_url" {
  description = "For clients: export TINKER_BASE_URL=..."
  value       = var.hostname == "" ? "http://127.0.0.1:8080" : "https://${var.hostname}"
}

output "port_forward_command" {
  description = "The way in without a hostname: it stands for TINKER_BASE_URL=http://127.0.0.1:8080 while it runs."
  value       = "kubectl port-forward -n knapper $(kubectl get pod -n knapper -l serving.knative.dev/service=gateway -o name | head -1) 8080:8080"
}

output "key_command" {
  description = "Makes a key for a tenant, inside the gateway's pod; it is shown once."
  value       = "kubectl exec -n knapper -c user-container $(kubectl get pod -n knapper -l serving.knative.dev/service=gateway -o name | head -1) -- python -m knapper key create TENANT"
}

output "inbox" {
  description = "Where jobs are dropped: INBOX/TENANT/JOB/job.yaml and the files that it names."
  value       = "gs://${var.platform.exchange_bucket}/inbox"
}

output "dns_records" {
  description = "To be set by hand where dns_zone is empty."
  value = local.exposed == 0 || var.dns_zone != "" ? [] : [
    "${var.hostname}. A ${google_compute_global_address.this[0].address}",
    join(" ", [
      google_certificate_manager_dns_authorization.this[0].dns_resource_record[0].name,
      google_certificate_manager_dns_authorization.this[0].dns_resource_record[0].type,
      google_certificate_manager_dns_authorization.this[0].dns_resource_record[0].data,
    ]),
  ]
}
