variable "project" {
  description = "The Google Cloud project."
  type        = string
}

variable "region" {
  description = "Where the subnetwork lies."
  type        = string
}

variable "name" {
  description = "Of the network and what belongs to it."
  type        = string
}

variable "nodes_cidr" {
  description = "Addresses of nodes."
  type        = string
  default     = "10.10.0.0/20"

  validation {
    condition     = can(cidrhost(var.nodes_cidr, 0))
    error_message = "nodes_cidr must be a CIDR range, such as 10.10.0.0/20."
  }
}

variable "pods_cidr" {
  description = "Addresses of pods: a /24 a node."
  type        = string
  default     = "10.20.0.0/16"

  validation {
    condition     = can(cidrhost(var.pods_cidr, 0))
    error_message = "pods_cidr must be a CIDR range, such as 10.20.0.0/16."
  }
}

variable "services_cidr" {
  description = "Addresses of Kubernetes Services."
  type        = string
  default     = "10.30.0.0/20"

  validation {
    condition     = can(cidrhost(var.services_cidr, 0))
    error_message = "services_cidr must be a CIDR range, such as 10.30.0.0/20."
  }
}
