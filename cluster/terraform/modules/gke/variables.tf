variable "name" {
  type = string
}

variable "project" {
  type = string
}

variable "region" {
  type = string
}

variable "zones" {
  type = list(string)
}

variable "network" {
  type = string
}

variable "subnetwork" {
  type = string
}

variable "autopilot" {
  description = "Autopilot makes nodes itself; the chart then needs argocd/values/autopilot.yaml."
  type        = bool
}

variable "control_plane_range" {
  description = "A /28 for the control plane."
  type        = string
}

variable "administrators" {
  description = "Who may reach the API server, by name: private ranges only."
  type        = map(string)
}

variable "maintenance" {
  type = object({ start_time = string, end_time = string, recurrence = string })
}

variable "managed_prometheus" {
  description = "Collect metrics into Cloud Monitoring."
  type        = bool
}

variable "kms_key" {
  type = string
}

variable "cpu_machine_type" {
  type = string
}

variable "cpu_nodes_max" {
  type = number
}

variable "groups" {
  description = "Groups of GPU nodes, as modules/pools reads them from the chart."
  type = map(object({
    pool        = string
    spot        = bool
    gpus        = number
    accelerator = string
    max_nodes   = number
  }))
}

variable "machines" {
  description = "By accelerator: which machines carry it, and in which zones they are."
  type = map(object({
    machine_type = string
    disk_type    = string
    zones        = list(string)
  }))
}

variable "upgrade_surge_ratio" {
  description = "Nodes beside those that run, as a share, for an upgrade with a second cluster: 0 to 1."
  type        = number

  validation {
    condition     = var.upgrade_surge_ratio >= 0 && var.upgrade_surge_ratio <= 1
    error_message = "upgrade_surge_ratio: from 0 (upgrades with an outage) to 1 (as many GPUs again)."
  }
}
