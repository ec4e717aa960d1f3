variable "project" {
  description = "The Google Cloud project."
  type        = string
}

variable "project_number" {
  description = "Its number."
  type        = string

  validation {
    condition     = can(regex("^[0-9]+$", var.project_number))
    error_message = "project_number must be the number of the project, not its id."
  }
}

variable "name" {
  description = "Of the pool and the role."
  type        = string
}

variable "namespace" {
  description = "Where the services run."
  type        = string
  default     = "knapper"
}

variable "issuer" {
  description = "Who signs the cluster's service account tokens."
  type        = string
}

variable "state_bucket" {
  description = "The bucket of state."
  type        = string
}

variable "exchange_bucket" {
  description = "The bucket of inbox and outputs."
  type        = string
}

variable "models_bucket" {
  description = "The bucket of base models."
  type        = string
}

variable "subscription" {
  description = "The subscription that the gateway pulls."
  type        = string
}
