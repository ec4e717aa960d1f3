variable "project" {
  description = "The Google Cloud project."
  type        = string
}

variable "cluster" {
  description = "The cluster's id."
  type        = string
}

variable "location" {
  description = "Zone or region of the cluster."
  type        = string
}

variable "zones" {
  description = "Zones that have this GPU."
  type        = list(string)

  validation {
    condition     = length(var.zones) > 0
    error_message = "zones must name at least one zone that has the GPU."
  }
}

variable "name" {
  description = "Of the pool."
  type        = string
}

variable "nodes_account" {
  description = "The service account of nodes."
  type        = string
}

variable "machine_type" {
  description = "Of the nodes; it must fit the accelerator, such as g2-standard-8 for nvidia-l4."
  type        = string
}

variable "accelerator" {
  description = "The GPU, as GKE names it."
  type        = string

  validation {
    condition     = can(regex("^nvidia-[a-z0-9-]+$", var.accelerator))
    error_message = "accelerator must be a GPU as GKE names it, such as nvidia-l4 or nvidia-h100-80gb."
  }
}

variable "accelerators_per_node" {
  description = "GPUs of one node; a pod with components/gpus-8 needs 8, of a3-highgpu-8g or g2-standard-96."
  type        = number
  default     = 1

  validation {
    condition     = contains([1, 2, 4, 8], var.accelerators_per_node)
    error_message = "accelerators_per_node must be 1, 2, 4 or 8."
  }
}

variable "compact_placement" {
  description = "Nodes close to each other, for base models that are spread over more than one; then zones must be one."
  type        = bool
  default     = false
}

variable "nodes_max" {
  description = "Nodes at most, over all zones: what a day can cost is this times 24 times their price."
  type        = number

  validation {
    condition     = var.nodes_max >= 1
    error_message = "nodes_max must be at least 1."
  }
}

variable "provisioning" {
  description = "spot: cheapest, may vanish. flex: queued for up to a week's run, for GPUs that are hard to get. standard: full price."
  type        = string
  default     = "spot"

  validation {
    condition     = contains(["spot", "flex", "standard"], var.provisioning)
    error_message = "provisioning must be spot, flex or standard."
  }
}

variable "flex_max_run_s" {
  description = "How long a flex node lives at most."
  type        = number
  default     = 86400

  validation {
    condition     = var.flex_max_run_s >= 600 && var.flex_max_run_s <= 604800
    error_message = "flex_max_run_s must be from 600 to 604800 (a week)."
  }
}

variable "time_sharing_clients" {
  description = "Pods that share one GPU in turns; 1: none. Memory is not divided: the overlay gke-l4-shared tells each of them its part."
  type        = number
  default     = 1

  validation {
    condition     = var.time_sharing_clients >= 1 && var.time_sharing_clients <= 48
    error_message = "time_sharing_clients must be from 1 (no sharing) to 48."
  }
}

variable "disk_size_gb" {
  description = "Of a node's boot disk: images, and the cache of weights."
  type        = number
  default     = 200
}

variable "nodes_warm" {
  description = "Nodes that run without work, so that no start waits for one: each is paid for all the time. 0: none."
  type        = number
  default     = 0

  validation {
    condition     = var.nodes_warm >= 0 && var.nodes_warm <= 16
    error_message = "nodes_warm must be from 0 to 16, and not over nodes_max."
  }
}

variable "image_disk" {
  description = "A disk image with container images on it (global/images/NAME), made by Google's gke-disk-image-builder; empty: none."
  type        = string
  default     = ""

  validation {
    condition     = var.image_disk == "" || can(regex("^(projects/[a-z0-9-]+/)?global/images/[a-z0-9-]+$", var.image_disk))
    error_message = "image_disk must be [projects/PROJECT/]global/images/NAME, or empty."
  }
}

variable "local_ssds" {
  description = "Disks inside the machine for caches; what machine types take is in Google's table of local SSDs. 0: none."
  type        = number
  default     = 0

  validation {
    condition     = var.local_ssds >= 0 && var.local_ssds <= 32
    error_message = "local_ssds must be from 0 to 32."
  }
}
