output "check_command" {
  description = "Says when Knative is ready, and what is wrong otherwise."
  value       = "kubectl wait --for=condition=Ready knativeserving/knative-serving -n knative-serving --timeout=10m && kubectl wait --for=condition=Ready knativeeventing/knative-eventing -n knative-eventing --timeout=10m && knapper doctor"
}
