variable "platform" {
  description = "What 10-platform says: terraform -chdir=../10-platform output -json platform."
  type = object({
    project         = string
    region          = string
    location        = string
    name            = string
    state_bucket    = string
    exchange_bucket = string
    models_bucket   = string
    subscription    = string
    reward_audience = string
  })
}

variable "operator_version" {
  description = "Of Knative's operator, which installs Serving and Eventing of the versions in knative/cluster/operator."
  type        = string
  default     = "1.23.0"

  validation {
    condition     = can(regex("^1\\.2[2-9]\\.[0-9]+$", var.operator_version))
    error_message = "operator_version must be 1.22.0 or newer: the manifests were checked against 1.22."
  }
}
