variable "name" {
  description = "Of the Helm release."
  type        = string
}

variable "namespace" {
  description = "Where Helm keeps the release; objects say their own namespace."
  type        = string
}

variable "objects" {
  description = "Kubernetes objects, decoded."
  type        = any
}

variable "timeout_s" {
  description = "How long Helm waits."
  type        = number
  default     = 600
}
