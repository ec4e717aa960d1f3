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

variable "overlay" {
  description = "The directory below knative/overlays that fits the GPUs."
  type        = string
  default     = "gke-l4"

  validation {
    condition     = can(regex("^gke-[a-z0-9-]+$", var.overlay))
    error_message = "overlay must be one of GKE's in knative/overlays, such as gke-l4, gke-h100 or gke-l4-vllm."
  }
}

variable "registry" {
  description = "Where the images are: the output of that name of 10-platform."
  type        = string
}

variable "release" {
  description = "The tag of all images; or, better, a digest for each in `digests`."
  type        = string

  validation {
    condition     = can(regex("^[A-Za-z0-9_][A-Za-z0-9._-]{0,127}$", var.release)) && var.release != "latest"
    error_message = "release must be a tag that never moves, so not latest: rolling back means naming the one before."
  }
}

variable "digests" {
  description = "Digests of images by target (gateway, train-step, sample or sample-vllm, reward); they win over the tag."
  type        = map(string)
  default     = {}

  validation {
    condition = alltrue([for target, digest in var.digests :
      contains(["gateway", "train-step", "sample", "sample-vllm", "reward"], target) && can(regex("^sha256:[0-9a-f]{64}$", digest))
    ])
    error_message = "digests must be sha256:... by target: gateway, train-step, sample, sample-vllm or reward."
  }
}

variable "hostname" {
  description = "Under which clients reach the gateway, with TLS; empty: it is not exposed, and clients use a port-forward."
  type        = string
  default     = ""

  validation {
    condition     = var.hostname == "" || can(regex("^[a-z0-9-]+(\\.[a-z0-9-]+)+$", var.hostname))
    error_message = "hostname must be a full name, such as tinker.example.com, or empty."
  }
}

variable "dns_zone" {
  description = "A Cloud DNS zone that holds the hostname; empty: set the records that the outputs name by hand."
  type        = string
  default     = ""
}

variable "settings" {
  description = "More settings for all services, such as KNAPPER_LOG_LEVEL: `knapper settings` lists them."
  type        = map(string)
  default     = {}

  validation {
    condition     = alltrue([for name in keys(var.settings) : startswith(name, "KNAPPER_")])
    error_message = "settings must be KNAPPER_ variables."
  }
}
