variable "project" {
  description = "The Google Cloud project."
  type        = string
}

variable "location" {
  description = "Zone or region of the cluster. A zone is cheaper, and what trains lies beside its bucket either way."
  type        = string
}

variable "name" {
  description = "Of the cluster."
  type        = string
}

variable "network" {
  description = "The network's id."
  type        = string
}

variable "subnetwork" {
  description = "The subnetwork's id, with the secondary ranges pods and services."
  type        = string
}

variable "release_channel" {
  description = "How soon Kubernetes is upgraded."
  type        = string
  default     = "REGULAR"

  validation {
    condition     = contains(["RAPID", "REGULAR", "STABLE"], var.release_channel)
    error_message = "release_channel must be RAPID, REGULAR or STABLE."
  }
}

variable "deletion_protection" {
  description = "Whether Terraform refuses to destroy the cluster. Nothing of value lies in it: the state is in buckets."
  type        = bool
  default     = false
}

variable "binary_authorization" {
  description = "Which images may run: DISABLED for all, or the project's policy."
  type        = string
  default     = "DISABLED"

  validation {
    condition     = contains(["DISABLED", "PROJECT_SINGLETON_POLICY_ENFORCE"], var.binary_authorization)
    error_message = "binary_authorization must be DISABLED or PROJECT_SINGLETON_POLICY_ENFORCE."
  }
}

variable "cpu_machine_type" {
  description = "Of nodes for Knative, the gateway and reward."
  type        = string
  default     = "e2-standard-4"
}

variable "cpu_nodes_min" {
  description = "CPU nodes that always run: they are what idle costs."
  type        = number
  default     = 1

  validation {
    condition     = var.cpu_nodes_min >= 1
    error_message = "cpu_nodes_min must be at least 1: the gateway and Knative never sleep."
  }
}

variable "cpu_nodes_max" {
  description = "CPU nodes at most."
  type        = number
  default     = 4
}

variable "sandbox_nodes_max" {
  description = "gVisor nodes at most, for reward; none while nothing is scored."
  type        = number
  default     = 2
}

variable "labels" {
  description = "Labels of the cluster, for bills."
  type        = map(string)
  default     = {}
}
