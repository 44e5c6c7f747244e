variable "project" {
  type = string
}

variable "region" {
  type = string
}

variable "zones" {
  description = "Zones of CPU nodes."
  type        = list(string)
}

variable "backup_location" {
  description = "Another region than `region`: the ledger's backups must outlive it."
  type        = string

  validation {
    condition     = var.backup_location != var.region
    error_message = "backup_location: a region's loss must not take the backups with it; name another."
  }
}

variable "name" {
  type    = string
  default = "headrace"
}

variable "namespace" {
  type    = string
  default = "serving"
}

variable "release" {
  type    = string
  default = "headrace"
}

variable "autopilot" {
  type    = bool
  default = false
}

variable "managed_prometheus" {
  description = "Metrics into Cloud Monitoring as well."
  type        = bool
  default     = false
}

variable "administrators" {
  description = "Private ranges that may reach the API server, by name."
  type        = map(string)

  validation {
    condition = alltrue([
      for range in values(var.administrators) : can(regex("^(10\\.|172\\.(1[6-9]|2[0-9]|3[01])\\.|192\\.168\\.)", range))
    ])
    error_message = "administrators: private ranges only; the API server has no public address."
  }
}

variable "ranges" {
  type = object({
    nodes    = string
    pods     = string
    services = string
    managed  = object({ address = string, prefix_length = number })
  })
  default = {
    nodes    = "10.0.0.0/20"
    pods     = "10.4.0.0/14"
    services = "10.8.0.0/20"
    managed  = { address = "10.9.0.0", prefix_length = 20 }
  }
}

variable "control_plane_range" {
  type    = string
  default = "10.10.0.0/28"
}

variable "maintenance" {
  description = "When GKE may move nodes. RFC 5545."
  type        = object({ start_time = string, end_time = string, recurrence = string })
  default = {
    start_time = "2026-01-03T02:00:00Z"
    end_time   = "2026-01-03T08:00:00Z"
    recurrence = "FREQ=WEEKLY;BYDAY=SA,SU"
  }
}

variable "cpu_machine_type" {
  type    = string
  default = "n2-standard-8"
}

variable "cpu_nodes_max" {
  type    = number
  default = 8
}

variable "machines" {
  description = "By accelerator, as the chart's pools name it. The zones are those of europe-west4."
  type = map(object({
    machine_type = string
    disk_type    = string
    zones        = list(string)
  }))
  default = {
    nvidia-l4 = {
      machine_type = "g2-standard-32"
      disk_type    = "pd-balanced"
      zones        = ["europe-west4-a", "europe-west4-b", "europe-west4-c"]
    }
    nvidia-h100-80gb = {
      machine_type = "a3-highgpu-2g"
      disk_type    = "pd-balanced"
      zones        = ["europe-west4-b", "europe-west4-c"]
    }
  }
}

variable "upgrade_surge_ratio" {
  description = "Room in the GPU pools for a second cluster during an upgrade (docs/runbooks/gpu-capacity.md)."
  type        = number
  default     = 1
}

variable "database_tier" {
  type    = string
  default = "db-custom-2-7680"
}

variable "password_version" {
  type    = number
  default = 1
}
