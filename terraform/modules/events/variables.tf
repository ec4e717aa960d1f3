variable "project" {
  description = "The Google Cloud project."
  type        = string
}

variable "region" {
  description = "Where messages are kept."
  type        = string
}

variable "name" {
  description = "Of topic and subscription."
  type        = string
}

variable "bucket" {
  description = "The bucket of the inbox."
  type        = string
}

variable "labels" {
  description = "Labels, for bills."
  type        = map(string)
  default     = {}
}
