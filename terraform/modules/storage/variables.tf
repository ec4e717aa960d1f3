variable "project" {
  description = "The Google Cloud project."
  type        = string
}

variable "prefix" {
  description = "Of the buckets' names, which all the world shares."
  type        = string

  validation {
    condition     = can(regex("^[a-z0-9][a-z0-9-]{1,50}$", var.prefix))
    error_message = "prefix must be 2 to 51 small letters, digits and '-', the first a letter or digit."
  }
}

variable "location" {
  description = "The region of the GPUs."
  type        = string
}

variable "force_destroy" {
  description = "Whether `terraform destroy` deletes the buckets with all that is in them."
  type        = bool
  default     = false
}

variable "labels" {
  description = "Labels of the buckets, for bills."
  type        = map(string)
  default     = {}
}
