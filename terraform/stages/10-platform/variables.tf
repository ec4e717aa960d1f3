variable "project" {
  description = "The Google Cloud project; its APIs are switched on here."
  type        = string

  validation {
    condition     = can(regex("^[a-z][a-z0-9-]{4,28}[a-z0-9]$", var.project))
    error_message = "project must be a project id: 6 to 30 small letters, digits and '-'."
  }
}

variable "region" {
  description = "Where the GPUs are, and with them the buckets."
  type        = string

  validation {
    condition     = can(regex("^[a-z]+-[a-z]+[0-9]$", var.region))
    error_message = "region must be a region, such as us-central1, not a zone."
  }
}

variable "name" {
  description = "Of the cluster and what belongs to it."
  type        = string
  default     = "knapper"

  validation {
    condition     = can(regex("^[a-z][a-z0-9-]{1,19}$", var.name))
    error_message = "name must be 2 to 20 small letters, digits and '-'."
  }
}

variable "location" {
  description = "Zone or region of the cluster; empty: the region's zone b."
  type        = string
  default     = ""
}

variable "gpu_pools" {
  description = "GPU pools by name; from zero nodes unless nodes_warm says otherwise. Which GPUs a zone has: gcloud compute accelerator-types list."
  type = map(object({
    machine_type          = string
    accelerator           = string
    zones                 = list(string)
    accelerators_per_node = optional(number, 1)
    compact_placement     = optional(bool, false)
    nodes_max             = optional(number, 2)
    provisioning          = optional(string, "spot")
    time_sharing_clients  = optional(number, 1)
    nodes_warm            = optional(number, 0)
    image_disk            = optional(string, "")
    local_ssds            = optional(number, 0)
  }))
  default = {}

  validation {
    condition     = alltrue([for pool in values(var.gpu_pools) : contains(["spot", "flex", "standard"], pool.provisioning)])
    error_message = "provisioning of each pool must be spot, flex or standard."
  }

  validation {
    condition     = alltrue([for name in keys(var.gpu_pools) : can(regex("^[a-z][a-z0-9-]{0,30}$", name))])
    error_message = "names of pools must be small letters, digits and '-'."
  }
}

variable "cpu_nodes_min" {
  description = "CPU nodes that always run: with the control plane, they are what idle costs."
  type        = number
  default     = 1
}

variable "deletion_protection" {
  description = "Whether Terraform refuses to destroy the cluster."
  type        = bool
  default     = false
}

variable "force_destroy" {
  description = "Whether `terraform destroy` deletes the buckets with all that is in them."
  type        = bool
  default     = false
}

variable "billing_account" {
  description = "The billing account for a budget; empty: none."
  type        = string
  default     = ""
}

variable "monthly_budget" {
  description = "In the billing account's currency."
  type        = number
  default     = 200
}

variable "email" {
  description = "Who hears of the budget; empty: the billing account's administrators alone."
  type        = string
  default     = ""
}
